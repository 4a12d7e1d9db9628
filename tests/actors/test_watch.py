"""Who is frozen and who is only slow: the state machine, and looks at real processes."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from cohort.actors.watch import BEAT_S, BUSY_FACTOR, FROZEN_S, Look, Watch
from cohort.actors.witness import look_at

ASLEEP = Look((1,), 7.0, stopped=False, awake=False)
STOPPED = Look((1,), 7.0, stopped=True, awake=False)
LONG = round(100 / BEAT_S)


def seconds_until_frozen(looks: Iterator[Look | None] | list[Look | None], **told: int) -> float:
    watch = Watch()
    for look in looks:
        watch.beat(BEAT_S, look=look, **told)
        if watch.frozen:
            return watch.total_s
    return float("inf")


@pytest.mark.parametrize("look", [ASLEEP, STOPPED])
def test_what_is_stopped_or_sleeps_with_work_is_frozen_within_15_seconds(look: Look) -> None:
    # A beat passes before it is asked, one before it is looked at, one until somebody asks.
    assert seconds_until_frozen([None, None, *[look] * LONG]) + BEAT_S <= 15
    assert seconds_until_frozen([look] * LONG, progress=3) + BEAT_S <= 15


def test_what_sleeps_without_work_is_not_frozen() -> None:
    watch = Watch()
    for _ in range(LONG):
        watch.beat(BEAT_S, 3, ASLEEP, working=False)
    assert not watch.frozen


@pytest.mark.parametrize("seed", range(100))
def test_slow_and_healthy_is_never_frozen(seed: int) -> None:
    """Whatever of the three signs of life it shows, in any order."""
    dice = random.Random(seed)
    signs = dice.sample(["token", "computes", "wants to"], dice.randint(1, 3))
    watch, progress, cpu_s = Watch(), 0, 0.0
    for sign in dice.choices(signs, k=LONG):
        progress += sign == "token"
        cpu_s += 0.2 * BEAT_S * (sign == "computes")
        watch.beat(BEAT_S, progress, Look((1,), cpu_s, False, awake=sign == "wants to"))
        assert not watch.frozen


@pytest.mark.parametrize("seed", range(20))
def test_frozen_takes_so_many_seconds_of_proof_in_a_row(seed: int) -> None:
    watch, in_a_row, dice = Watch(), 0.0, random.Random(seed)
    for number in range(300):
        stop = dice.random() < 0.9
        watch.beat(1.0, progress=number if not stop else None, look=STOPPED if stop else ASLEEP)
        in_a_row = in_a_row + 1.0 if stop else 0.0
        assert watch.frozen == (in_a_row >= FROZEN_S)


def test_another_process_in_its_place_has_computed_nothing_yet() -> None:
    watch = Watch()
    watch.beat(1.0, 0, Look((1,), 90.0, False, False))
    for second in range(1, 8):
        watch.beat(1.0, 0, Look((2,), 0.0, False, False))
        assert watch.frozen_s == second - 1, "the first look at it says nothing of its load"


def test_the_slow_clock_runs_slower_for_what_computes() -> None:
    watch = Watch()
    watch.beat(1.0, 1, ASLEEP)
    for second in range(1, 11):
        watch.beat(1.0, 1, Look((1,), 7.0 + second, False, True))
    assert watch.silent_s == pytest.approx(10 / BUSY_FACTOR)


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    """A process that sleeps in one thread and, once told to, computes in another."""
    program = (
        "import sys, threading, time\n"
        "threading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n"
        "print('up', flush=True)\n"
        "sys.stdin.readline()\n"
        "while True: pass\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.kill()
    process.communicate()


def look_until(pid: int, found: str) -> Look:
    for _ in range(200):
        look = look_at([pid])
        assert look is not None
        if getattr(look, found):
            return look
        time.sleep(0.01)
    raise AssertionError(f"never {found}")


def test_a_look_at_a_process_that_sleeps_computes_is_stopped_and_is_gone(
    child: subprocess.Popen[bytes],
) -> None:
    time.sleep(0.05)
    look = look_at([child.pid])
    assert look is not None
    assert (look.pids, look.stopped, look.awake) == ((child.pid,), False, False)
    assert child.stdin is not None
    child.stdin.write(b"\n")
    child.stdin.flush()
    busy = look_until(child.pid, "awake")
    time.sleep(0.1)
    later = look_at([child.pid])
    assert later is not None
    assert later.cpu_s > busy.cpu_s
    child.send_signal(signal.SIGSTOP)
    look_until(child.pid, "stopped")
    # Its other threads stop a moment later.
    time.sleep(0.1)
    stopped = look_at([child.pid])
    assert stopped is not None and stopped.stopped
    time.sleep(0.1)
    assert look_at([child.pid]) == stopped
    child.kill()
    child.wait()
    assert look_at([child.pid]) is None
    # Of several, those that are left.
    me = look_at([child.pid, os.getpid()])
    assert me is not None
    assert me.pids == (os.getpid(),)
