"""The supervisor: what it decides, and what becomes of real processes under it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from cohort.actors.errors import TRY_AGAIN
from cohort.cluster.config_file import load_config
from cohort.cluster.run_dir import SILENCE_S
from cohort.cluster.supervise import Again, Heartbeat, Leave, Starts, command, recorded_steps
from cohort.learner.ranks import LearnerError

ROOT = Path(__file__).resolve().parents[2]
TERM, INT, KILL = signal.SIGTERM, signal.SIGINT, signal.SIGKILL


@pytest.mark.parametrize(
    ("code", "asked", "left_with"),
    [
        (0, None, 0),
        (1, None, 1),
        (2, None, 2),
        (128 + TERM, None, 128 + TERM),
        (128 + TERM, TERM, TRY_AGAIN),
        (-KILL, TERM, TRY_AGAIN),
        (TRY_AGAIN, TERM, TRY_AGAIN),
        (1, TERM, 1),
        (0, TERM, 0),
        (128 + INT, INT, 128 + INT),
    ],
)
def test_what_a_new_start_would_not_change_is_not_started_again(
    code: int, asked: int | None, left_with: int
) -> None:
    decided = Starts(5).after(code, 3, asked)
    assert isinstance(decided, Leave)
    assert decided.code == left_with


@pytest.mark.parametrize("code", [-KILL, -signal.SIGSEGV, -signal.SIGABRT, TRY_AGAIN])
def test_a_lost_run_is_started_again_at_once(code: int) -> None:
    assert Starts(5).after(code, 3, None) == Again(0.0, Starts(5).after(code, 3, None).why)


def test_pauses_grow_and_the_limit_ends_it() -> None:
    starts = Starts(8)
    pauses = []
    while isinstance(decided := starts.after(-KILL, 4, None), Again):
        pauses.append(decided.pause_s)
    assert pauses == [0, 2, 4, 8, 16, 32, 60, 60]
    assert decided.code == 1
    assert "cluster.restarts=8" in decided.why


def test_steps_beyond_the_furthest_refill_the_budget_and_repeated_ones_do_not() -> None:
    starts = Starts(limit=2)
    assert all(isinstance(starts.after(-KILL, step, None), Again) for step in range(1, 50))
    # From a checkpoint the same steps are done again and again: that is no progress.
    assert isinstance(starts.after(-KILL, 49, None), Again)
    assert isinstance(starts.after(-KILL, 40, None), Leave)


def test_a_rank_that_is_gone_can_be_tried_again_and_its_mistake_cannot() -> None:
    assert LearnerError("rank 1 died", savable=False).exit_code == TRY_AGAIN
    assert LearnerError("rank 1 raised", savable=True).exit_code == 1


def test_a_driver_that_stops_touching_its_lock_is_silent() -> None:
    heartbeat = Heartbeat()
    assert not heartbeat.silent(None, 0)
    assert not heartbeat.silent(None, 10 * SILENCE_S), "it has not come so far yet"
    assert not heartbeat.silent(1.0, 11 * SILENCE_S)
    assert not heartbeat.silent(1.0, 12 * SILENCE_S)
    assert heartbeat.silent(1.0, 12 * SILENCE_S + 1)
    assert not heartbeat.silent(2.0, 12 * SILENCE_S + 2)


def test_later_starts_resume() -> None:
    words = command(Path("a.yaml"), ["run.steps=3", "--run.resume", "false"], resume=True)
    assert words[1:5] == ["-m", "cohort.cluster.cli", "train", "a.yaml"]
    model = ["model.path=/models/tiny"]
    assert load_config(None, [*words[5:], *model]).run.resume
    first = command(Path("a.yaml"), ["run.steps=3"], resume=False)
    assert not load_config(None, [*first[5:], *model]).run.resume


def test_steps_are_counted_without_a_torn_line(tmp_path: Path) -> None:
    assert recorded_steps(tmp_path) == 0
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n{"step": 2, "rew')
    assert recorded_steps(tmp_path) == 2


# A supervisor with a driver of a few lines in place of `cohort train`.
PARENT = """
import sys
from pathlib import Path
from cohort.cluster.config_file import load_config
from cohort.cluster.supervise import Supervisor

def start(again):
    return [sys.executable, "-c", sys.argv[2], "again" if again else "first"]

config = load_config(None, ["model.path=/none", "cluster.stop_grace_s=" + sys.argv[3]])
def say(line): print(line, file=sys.stderr, flush=True)
heavy = {"ray", "torch", "vllm", "deepspeed", "transformers"} & set(sys.modules)
assert not heavy, heavy
sys.exit(Supervisor(start, Path(sys.argv[1]), config, say).run())
"""
# The driver's first lines: it writes down that it was started, with its argument and its number.
DRIVER = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
starts = Path("starts")
with starts.open("a") as file: file.write(f"{sys.argv[1]} {os.getpid()}\\n")
count = len(starts.read_text().splitlines())
"""


class Supervised:
    """A supervisor in a process of its own."""

    def __init__(self, folder: Path, driver: str, grace_s: float = 20) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", PARENT, str(folder), DRIVER + driver, str(grace_s)],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
            text=True,
        )

    def starts(self) -> list[str]:
        file = self.folder / "starts"
        return [line.split()[0] for line in file.read_text().splitlines()] if file.is_file() else []

    def end(self) -> tuple[int, str]:
        _, said = self.process.communicate(timeout=60)
        return self.process.returncode, said


def until(what: Callable[[], bool], timeout_s: float = 30) -> None:
    began = time.monotonic()
    while not what():
        assert time.monotonic() < began + timeout_s
        time.sleep(0.02)


def lives(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def test_a_killed_driver_is_started_again_and_nothing_of_it_is_left(tmp_path: Path) -> None:
    """Its daemons, in sessions of their own, are ended, and their shared memory is removed."""
    driver = """
if count == 1:
    # As Ray's agents do it: what a title is written over is the environment.
    orphan = "import os, time; open('orphan', 'w').write(str(os.getpid())); time.sleep(300)"
    starting = f"subprocess.Popen([sys.executable, '-c', {orphan!r}], env={{}})"
    middle = f"import subprocess, sys; {starting}"
    subprocess.run([sys.executable, "-c", middle])
    while not (Path("orphan").exists() and Path("orphan").read_text()):
        time.sleep(0.01)
    daemon = '''
import mmap, os, sys, time
path = f"/dev/shm/psm_cohort_test_{os.getpid()}"
with open(path, "wb+") as file:
    file.write(b"0" * 4096)
    file.flush()
    held = mmap.mmap(file.fileno(), 4096)
open("daemon.tmp", "w").write(str(os.getpid()))
os.rename("daemon.tmp", "daemon")
time.sleep(300)
'''
    subprocess.Popen([sys.executable, "-c", daemon], start_new_session=True)
    weights = Path(f"/dev/shm/cohort-learner-{os.getpid()}-test")
    weights.mkdir()
    while not Path("daemon").exists():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    supervised = Supervised(tmp_path, driver)
    code, said = supervised.end()
    assert code == 0, said
    assert "still cleaning up" not in said
    assert supervised.starts() == ["first", "again"]
    assert "was killed by SIGKILL after 0 steps" in said
    daemon = int((tmp_path / "daemon").read_text())
    assert not lives(daemon)
    assert not lives(int((tmp_path / "orphan").read_text()))
    assert not Path(f"/dev/shm/psm_cohort_test_{daemon}").exists()
    driver_pid = (tmp_path / "starts").read_text().split()[1]
    assert not Path(f"/dev/shm/cohort-learner-{driver_pid}-test").exists()


def test_an_error_of_the_run_is_passed_on(tmp_path: Path) -> None:
    supervised = Supervised(tmp_path, "sys.exit(1)")
    assert supervised.end()[0] == 1
    assert supervised.starts() == ["first"]


SAVES = """
def save(number, frame):
    with open("signals", "a") as file: file.write(f"{number}\\n")
    time.sleep(0.5)
    os._exit(128 + number)
for number in (signal.SIGTERM, signal.SIGINT): signal.signal(number, save)
Path("ready").touch()
time.sleep(300)
"""


@pytest.mark.parametrize(("number", "code"), [(TERM, TRY_AGAIN), (INT, 128 + INT)])
def test_a_signal_is_passed_on_once_and_the_run_may_save(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    supervised = Supervised(tmp_path, SAVES)
    until((tmp_path / "ready").exists)
    supervised.process.send_signal(number)
    assert supervised.end()[0] == code
    assert (tmp_path / "signals").read_text() == f"{int(number)}\n"
    assert supervised.starts() == ["first"]


def test_a_run_that_does_not_save_in_its_grace_is_killed(tmp_path: Path) -> None:
    driver = """
from cohort.cluster.waiting import stacks_on_request
stacks_on_request()
signal.signal(signal.SIGTERM, signal.SIG_IGN)
def where_it_hangs():
    Path("ready").touch()
    while True: time.sleep(300)
where_it_hangs()
"""
    supervised = Supervised(tmp_path, driver, grace_s=1)
    until((tmp_path / "ready").exists)
    supervised.process.send_signal(TERM)
    code, said = supervised.end()
    assert code == TRY_AGAIN
    assert "cluster.stop_grace_s=1" in said
    assert "in where_it_hangs" in said


def test_a_run_whose_supervisor_is_killed_saves_and_leaves(tmp_path: Path) -> None:
    supervised = Supervised(tmp_path, SAVES)
    until((tmp_path / "ready").exists)
    driver = int((tmp_path / "starts").read_text().split()[1])
    supervised.process.kill()
    supervised.process.wait(10)
    until(lambda: not lives(driver))
    assert (tmp_path / "signals").read_text() == f"{int(TERM)}\n"


def test_a_second_signal_does_not_end_a_supervised_run_before_it_has_saved() -> None:
    """Whoever stops a job may signal the driver and the supervisor, which passes its signal on."""
    program = """
import asyncio, json
from cohort.cluster.signals import Signals

async def main():
    done = asyncio.Event()
    with Signals() as signals:
        signals.then(lambda: asyncio.get_running_loop().call_later(0.5, done.set))
        print("ready", flush=True)
        await done.wait()
    print(json.dumps("saved"), flush=True)

asyncio.run(main())
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COHORT_SUPERVISED": "x"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(TERM)
    time.sleep(0.1)
    process.send_signal(TERM)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert json.loads(out) == "saved"
