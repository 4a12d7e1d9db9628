"""Reward functions that misbehave in every way that a reward worker must survive."""

from __future__ import annotations

import asyncio
import ctypes
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

CALLS = 0
LOCK: asyncio.Lock | None = None


def length(completions: list[str]) -> list[float]:
    return [float(len(text)) for text in completions]


def count_calls(completions: list[str]) -> list[int]:
    """The number of calls this process has seen: 1 in a fresh child."""
    global CALLS
    CALLS += 1
    return [CALLS] * len(completions)


def process_id(completions: list[str]) -> list[int]:
    return [os.getpid()] * len(completions)


def change_columns(tags: list[list[str]]) -> list[int]:
    counts = [len(tag) for tag in tags]
    tags[0].append("mine")
    return counts


def none_for_odd(completions: list[str]) -> list[float | None]:
    return [None if index % 2 else 1.0 for index in range(len(completions))]


def nan_for_first(completions: list[str]) -> list[float]:
    return [float("nan")] + [1.0] * (len(completions) - 1)


def too_short() -> list[float]:
    return [1.0]


def raises() -> list[float]:
    raise KeyError("no such answer")


async def async_with_a_lock(completions: list[str]) -> list[float]:
    """A lock, as HTTP clients have, works only in the event loop that first used it."""
    global LOCK
    LOCK = LOCK or asyncio.Lock()
    async with LOCK:
        # Waiting for a held lock is what binds it to its loop.
        waiter = asyncio.create_task(LOCK.acquire())
        await asyncio.sleep(0)
    await waiter
    LOCK.release()
    return [2.0] * len(completions)


async def async_hang(completions: list[str]) -> list[float]:
    await asyncio.sleep(60 if completions[0] == "hang" else 0)
    return [1.0] * len(completions)


def hang(completions: list[str]) -> list[float]:
    time.sleep(60 if completions[0] == "hang" else 0)
    return [1.0] * len(completions)


def hang_in_c(completions: list[str]) -> list[float]:
    """Sleeps in C without releasing the interpreter lock, deaf to polite signals."""
    if completions[0] == "hang":
        for number in (signal.SIGTERM, signal.SIGALRM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        ctypes.PyDLL(None).sleep(60)
    return [1.0] * len(completions)


def hang_with_helper(completions: list[str], pid_file: list[str]) -> list[float]:
    helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    pathlib.Path(pid_file[0]).write_text(str(helper.pid))
    time.sleep(60)
    return [1.0] * len(completions)


def exit_hard(completions: list[str]) -> list[float]:
    if completions[0] == "die":
        os._exit(3)
    return [1.0] * len(completions)


def die_with_heir(completions: list[str]) -> list[float]:
    """Dies while a forked process keeps every descriptor open."""
    if completions[0] == "die" and os.fork() != 0:
        os._exit(4)
    if completions[0] == "die":
        time.sleep(60)
    return [1.0] * len(completions)


def segfault(completions: list[str]) -> list[float]:
    if completions[0] == "die":
        ctypes.string_at(0)
    return [1.0] * len(completions)


def terminate(completions: list[str]) -> list[float]:
    if completions[0] == "die":
        os.killpg(0, signal.SIGTERM)
    return [1.0] * len(completions)


def interrupt(completions: list[str]) -> list[float]:
    if completions[0] == "die":
        raise KeyboardInterrupt
    return [1.0] * len(completions)


def memory_bomb(completions: list[str]) -> list[float]:
    if completions[0] == "bomb":
        held = []
        while True:
            held.append(b"x" * (64 << 20))
    return [1.0] * len(completions)


def log_bomb(completions: list[str], log_extra: Any, log_metric: Any) -> list[float]:
    log_extra("text", ["x" * 10_000_000] * len(completions))
    if completions[0] == "bomb":
        for number in range(10**6):
            log_metric(f"metric {number}", 1)
    return [1.0] * len(completions)


def raise_for_bad(completions: list[str]) -> dict[str, Any]:
    for text in completions:
        if text == "bad":
            raise ValueError("a bad text")
    sizes = [len(text) for text in completions]
    return {
        "score": sizes,
        "half": [size / 2 for size in sizes],
        "shown": [text.upper() for text in completions],
    }


def logs(
    completions: list[str], truth: list[int], log_extra: Any, log_metric: Any, scale: int = 1
) -> list[int]:
    sizes = [len(text) for text in completions]
    log_extra("size", sizes)
    log_metric("longest", max(sizes))
    return [scale * value for value in truth]


def close_everything(completions: list[str]) -> list[float]:
    if completions[0] == "die":
        os.closerange(3, 256)
    return [1.0] * len(completions)


def forge_reply(completions: list[str]) -> list[float]:
    """Writes to the actor's socket itself."""
    if completions[0] == "die":
        for descriptor in map(int, os.listdir("/proc/self/fd")):
            try:
                forged = socket.socket(fileno=descriptor)
            except OSError:
                continue
            forged.sendall((3).to_bytes(8, "big") + b"boo")
            forged.detach()
    return [1.0] * len(completions)


def print_much(completions: list[str]) -> list[float]:
    for _ in range(20):
        print("x" * (1 << 20))
        print("y" * (1 << 20), file=sys.stderr)
    os.write(1, b"z" * (1 << 20))
    return [1.0] * len(completions)


def leave_an_alarm(completions: list[str]) -> list[float]:
    def ring(*_: Any) -> None:
        raise RuntimeError("late")

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    return [1.0] * len(completions)


def alarm_works(completions: list[str]) -> list[float]:
    """1.0 if SIGALRM interrupts a wait, as math-verify's timeouts need."""

    def ring(*_: Any) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    try:
        time.sleep(5)
    except TimeoutError:
        here = threading.current_thread() is threading.main_thread()
        return [float(here)] * len(completions)
    return [0.0] * len(completions)


def variable_is_set(variable: list[str]) -> list[bool]:
    return [name in os.environ for name in variable]


def heavy_modules(completions: list[str]) -> list[int]:
    heavy = {"torch", "learner", "ray", "vllm", "transformers", "pydantic"}
    return [len(heavy & set(sys.modules))] * len(completions)
