"""Ray's own processes: whose death ends what waits for actors, in virtual time."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from cohort.actors.errors import TRY_AGAIN
from cohort.cluster.errors import RayLostError
from cohort.cluster.ray_watch import (
    SILENT_LOOKS,
    Look,
    Loss,
    RayHealth,
    Server,
    _port,
    _process,
    _socket,
    unless_ray_dies,
)
from tests.harness.clock import run


def server(*looks: Look) -> Server:
    """One that shows these looks, and the last one from then on."""
    left = list(looks)

    async def look() -> Look:
        return left.pop(0) if len(left) > 1 else left[0]

    return look


async def hangs(ended: list[str] | None = None) -> None:
    try:
        await asyncio.sleep(10_000)
    finally:
        if ended is not None:
            ended.append("ended")


def test_a_death_is_seen_at_once_and_silence_after_some_looks() -> None:
    assert RayHealth().see({"raylet": "alive", "gcs_server": "dead"}) == Loss("gcs_server", "died")
    health = RayHealth()
    assert not any(health.see({"raylet": "silent"}) for _ in range(SILENT_LOOKS - 1))
    assert health.see({"raylet": "alive"}) is None
    assert not any(health.see({"raylet": "silent"}) for _ in range(SILENT_LOOKS - 1))
    assert health.see({"raylet": "silent"}) is not None


def test_of_two_losses_the_one_that_ends_the_actors_counts() -> None:
    loss = RayHealth().see({"gcs_server": "dead", "raylet": "dead"})
    assert loss is not None and loss.ends_actors
    assert not Loss("gcs_server", "died").ends_actors


def test_what_waits_for_ever_is_ended_and_a_new_start_may_help() -> None:
    ended: list[str] = []
    told: list[Loss] = []
    began = time.monotonic()

    async def main() -> float:
        start = time.monotonic()
        with pytest.raises(RayLostError, match="raylet died") as caught:
            servers = {"raylet": server("alive", "alive", "dead")}
            await unless_ray_dies(hangs(ended), servers, told.append)
        assert caught.value.exit_code == TRY_AGAIN
        return time.monotonic() - start

    assert run(main()) < 5
    assert (ended, told) == (["ended"], [Loss("raylet", "died")])
    assert time.monotonic() - began < 5


def test_an_actors_error_that_comes_before_the_death_is_seen_is_the_death() -> None:
    async def fails() -> None:
        raise ValueError("the actor died")

    with pytest.raises(RayLostError):
        run(unless_ray_dies(fails(), {"raylet": server("dead")}))
    with pytest.raises(ValueError, match="the actor died"):
        run(unless_ray_dies(fails(), {"raylet": server("alive")}))


def test_what_does_not_end_when_it_is_cancelled_is_not_waited_for() -> None:
    async def stuck() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(10_000)
        await asyncio.sleep(10_000)

    async def main() -> float:
        began = time.monotonic()
        with pytest.raises(RayLostError):
            await unless_ray_dies(stuck(), {"gcs_server": server("dead")})
        return time.monotonic() - began

    assert run(main()) < 60


def test_what_ends_well_is_not_lost() -> None:
    async def works() -> int:
        await asyncio.sleep(3)
        return 7

    assert run(unless_ray_dies(works(), {"raylet": server("alive")})) == 7
    assert run(unless_ray_dies(works(), {})) == 7


def test_who_is_cancelled_cancels_the_work() -> None:
    ended: list[str] = []

    async def main() -> None:
        task = asyncio.ensure_future(unless_ray_dies(hangs(ended), {"raylet": server("alive")}))
        await asyncio.sleep(3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main())
    assert ended == ["ended"]


def test_looks_at_real_processes_and_ports(tmp_path: Path) -> None:
    process = subprocess.Popen(["sleep", "60"])
    look = _process(psutil.Process(process.pid))

    async def main() -> list[Look]:
        served = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
        port = served.sockets[0].getsockname()[1]
        path = str(tmp_path / "raylet")
        unix = await asyncio.start_unix_server(lambda *_: None, path)
        looks = [await look(), await _port("127.0.0.1", port)(), await _socket(path)()]
        served.close()
        unix.close()
        os.kill(process.pid, signal.SIGSTOP)
        while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
            await asyncio.sleep(0.01)
        looks += [await look(), await _port("127.0.0.1", port)(), await _socket(path)()]
        process.kill()
        while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
            await asyncio.sleep(0.01)
        return [*looks, await look()]

    try:
        assert asyncio.run(main()) == [*3 * ["alive"], *3 * ["silent"], "dead"]
    finally:
        process.kill()
        process.wait(10)
    assert asyncio.run(look()) == "dead"  # type: ignore[arg-type]
