"""What a process writes before those who wait for it give up."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
import time
from multiprocessing import shared_memory
from pathlib import Path

from cohort.actors.process import mapped_shared_memory

LATE = """
import time
from cohort.actors.process import stacks_if_late

def hang(seconds):
    time.sleep(seconds)

with stacks_if_late({timeout_s}):
    hang({seconds})
time.sleep(0.5)
print("went on")
"""


def run(timeout_s: float, seconds: float) -> tuple[str, str]:
    code = LATE.format(timeout_s=timeout_s, seconds=seconds)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout, done.stderr


def test_a_late_block_shows_where_it_is() -> None:
    printed, errors = run(timeout_s=0.2, seconds=0.5)
    assert printed == "went on\n"
    assert errors.count("most recent call first") == 1
    assert "in hang" in errors


def test_one_in_time_leaves_nothing() -> None:
    assert run(timeout_s=0.4, seconds=0.01) == ("went on\n", "")


def test_semaphores_and_shared_memory_are_found_by_what_they_are() -> None:
    """Python links a semaphore to another name than it was mapped under."""
    lock = multiprocessing.get_context("spawn").Lock()
    block = shared_memory.SharedMemory(create=True, size=64)
    try:
        found = {path.name for path in mapped_shared_memory([os.getpid()])}
        assert f"sem.{lock._semlock.name.strip('/')}" in found
        assert block.name in found
    finally:
        block.close()
        block.unlink()
    assert block.name not in {path.name for path in mapped_shared_memory([os.getpid()])}


def test_nothing_in_shared_memory_outlives_a_killed_process(tmp_path: Path) -> None:
    """Also what its children map that it never told of."""
    folder = tmp_path / "weights"
    code = f"""
import multiprocessing, os, signal, time
from pathlib import Path
from cohort.actors.process import start_reaper

def child(lock, ready):
    Path(ready).touch()
    time.sleep(60)

if __name__ == "__main__":
    folder = Path({str(folder)!r})
    start_reaper(folder)
    folder.mkdir()
    context = multiprocessing.get_context("spawn")
    lock = context.Lock()
    ready = folder.with_name("ready")
    context.Process(target=child, args=(lock, ready)).start()
    while not ready.exists():
        time.sleep(0.05)
    print(lock._semlock.name.strip("/"), flush=True)
    # As when it is killed with its tracker, which would remove the name.
    from multiprocessing import resource_tracker
    os.kill(resource_tracker._resource_tracker._pid, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    script = tmp_path / "script.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    name = Path("/dev/shm") / f"sem.{done.stdout.strip()}"
    assert done.stdout.startswith("mp-"), done.stderr
    deadline = time.monotonic() + 20
    while name.exists() or folder.exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_openmp_files_of_the_dead_are_swept() -> None:
    """A rank may be killed while it imports torch, before it has a watcher of its own; what lives
    keeps its file. Dead is also whose parent has not asked yet, and whose number a thread has."""
    child, unasked = (subprocess.Popen(["sleep", "60"]) for _ in range(2))
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    *gone, living = (
        Path(f"/dev/shm/__KMP_REGISTERED_LIB_{pid}_{os.getuid()}")
        for pid in (child.pid, unasked.pid, thread.native_id, os.getpid())
    )
    mine = not living.exists()
    for file in (*gone, living):
        file.touch()
    try:
        code = "from cohort.actors.process import start_sweeper; start_sweeper(); print(); input()"
        pipe = subprocess.PIPE
        driver = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe)
        assert driver.stdout is not None
        assert driver.stdout.readline() == b"\n"
        child.kill()
        child.wait()
        unasked.kill()
        driver.kill()
        driver.wait()
        deadline = time.monotonic() + 20
        while left := [file for file in gone if file.exists()]:
            assert time.monotonic() < deadline, left
            time.sleep(0.1)
        assert living.exists()
    finally:
        stop.set()
        unasked.wait()
        for file in gone:
            file.unlink(missing_ok=True)
        if mine:
            living.unlink(missing_ok=True)


def test_a_sweeper_ends_nothing(tmp_path: Path) -> None:
    """What uploads the last records of a run may live on for a while."""
    done = tmp_path / "done"
    code = f"""
import subprocess
from cohort.actors.process import start_sweeper
start_sweeper()
subprocess.Popen(["sh", "-c", "sleep 1; touch {done}"], start_new_session=True)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert not done.exists()
    deadline = time.monotonic() + 20
    while not done.exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
