"""Calls that may never end are made in a process that does."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cohort.rewards.bounded import Bounded, TooMuch

pytestmark = pytest.mark.slow

calls: list[str] = []


def work(what: str) -> Any:
    calls.append(what)
    if what == "power":
        return 9 ** (9**9)
    if what == "sleep":
        time.sleep(60)
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "memory":
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
        return len(b"x" * (4 << 30))
    if what == "raise":
        raise KeyError("of its own")
    if what == "large":
        return "x" * 3_000_000
    return os.getpid(), len(calls)


@pytest.fixture
def bounded() -> Iterator[Bounded]:
    made = Bounded(work)
    yield made
    made.close()


@pytest.mark.parametrize("what", ["power", "sleep", "die", "memory"])
def test_what_takes_too_much_is_ended_and_the_next_call_works(bounded: Bounded, what: str) -> None:
    first, _ = bounded(30, "ok")
    started = time.perf_counter()
    with pytest.raises(TooMuch):
        bounded(0.5, what)
    assert time.perf_counter() - started < 10
    second, _ = bounded(30, "ok")
    assert what == "memory" or second != first
    assert not Path(f"/proc/{first}").exists() or what == "memory"


def test_the_process_is_kept_and_is_another(bounded: Bounded) -> None:
    pid, count = bounded(30, "ok")
    assert pid != os.getpid()
    assert bounded(30, "ok") == (pid, count + 1)
    assert "ok" not in calls


def test_waiting_for_a_core_on_a_busy_machine_is_not_too_much(bounded: Bounded) -> None:
    pid, _ = bounded(30, "ok")
    os.kill(pid, signal.SIGSTOP)
    later = threading.Timer(0.8, os.kill, (pid, signal.SIGCONT))
    later.start()
    try:
        assert bounded(0.4, "ok")[0] == pid
    finally:
        later.join()


def test_a_process_may_have_a_thousand_files_open(bounded: Bounded) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.ExitStack() as opened:
        opened.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 2048)), hard))
        for _ in range(1100):
            opened.enter_context(open(os.devnull, "rb"))
        assert bounded(30, "ok")


def test_errors_and_long_results(bounded: Bounded) -> None:
    with pytest.raises(RuntimeError, match="KeyError: 'of its own'"):
        bounded(30, "raise")
    assert len(bounded(30, "large")) == 3_000_000
    with pytest.raises(RuntimeError, match="pickle"):
        Bounded(lambda: lambda: 0)(5)


def test_it_ends_with_its_owner(tmp_path: Path) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            helper, _ = Bounded(work)(30, "ok")
            (tmp_path / "helper").write_text(str(helper), encoding="utf-8")
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    helper = int((tmp_path / "helper").read_text(encoding="utf-8"))
    deadline = time.monotonic() + 5
    while Path(f"/proc/{helper}").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not Path(f"/proc/{helper}").exists()
