"""Signals before, between and after: quiet, with the code that shells expect."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cohort.cluster.signals import Signals, Stopped

ROOT = Path(__file__).resolve().parents[2]

IMPORTING = """
import sys
sys.argv[0] = "/somewhere/bin/cohort"
from cohort.cluster.signals import leave_at_once_on_signals
leave_at_once_on_signals()
print("ready", flush=True)
try:
    import time
    time.sleep(60)
except BaseException:
    print("swallowed", flush=True)
"""
TWICE = """
import asyncio
from cohort.cluster.signals import Signals

async def main():
    with Signals() as signals:
        signals.then(lambda: print("asked", flush=True))
        print("ready", flush=True)
        await asyncio.sleep(60)

asyncio.run(main())
"""


def started(program: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_during_the_imports_ends_the_command_quietly(number: signal.Signals) -> None:
    process = started(IMPORTING)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert (out, err) == ("", f"{number.name}: leaving\n")


def test_a_second_signal_leaves_at_once() -> None:
    process = started(TWICE)
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    assert process.stdout.readline() == "asked\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130


def test_a_forked_child_just_ends() -> None:
    with Signals() as signals:
        child = os.fork()
        if child == 0:
            try:
                time.sleep(60)
            finally:
                os._exit(1)
        time.sleep(0.1)
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 143
        assert signals.caught is None


def test_before_a_loop_a_signal_is_an_exception_and_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as signals:
        with pytest.raises(Stopped) as stopped:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        assert stopped.value.exit_code == 143
        # A library's bare `except:` may have swallowed it.
        with pytest.raises(Stopped):
            signals.check()
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_a_signal_does_can_be_told_after_it_came() -> None:
    async def main() -> list[str]:
        said: list[str] = []
        with Signals() as signals:
            signals.then(lambda: said.append("undo the start"))
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(0.01)
            signals.then(lambda: said.append("save"))
        return said

    assert asyncio.run(main()) == ["undo the start", "save"]


def test_handlers_that_a_library_sets_are_replaced() -> None:
    with Signals() as signals:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signals.install()
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
