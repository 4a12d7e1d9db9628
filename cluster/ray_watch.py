"""Notices that Ray's own processes are gone: nothing that waits for an actor would end any more.

Ray itself says nothing when the raylet of a driver dies, and only after a minute that the GCS did.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import psutil

from cohort.cluster.errors import RayLostError

T = TypeVar("T")
Look = Literal["alive", "dead", "silent"]
Server = Callable[[], Awaitable[Look]]
# Without these nothing goes on. They are children of the driver that started Ray.
RAY_SERVERS = {"raylet", "gcs_server"}
LOOK_S = 1.0
# So many silent looks in a row are a death, too: a process that is stopped, a port without answer.
SILENT_LOOKS = 10
CONNECT_S = 1.0
# How long a run may take to end its step and save it when its actors have outlived Ray's GCS.
SAVE_S = 30.0
# How long what is cancelled may take to end.
LEAVE_S = 15.0


@dataclass(frozen=True)
class Loss:
    """A server of Ray that is gone.

    Attributes:
        server: Its name.
        how: What happened, in words.
    """

    server: str
    how: str

    @property
    def ends_actors(self) -> bool:
        """Whether the processes of actors end with it: a raylet's do, those of a GCS work on."""
        return self.server.startswith("raylet")

    def __str__(self) -> str:
        return f"Ray's {self.server} {self.how}"


@dataclass
class RayHealth:
    """Judges looks at Ray's servers.

    Example:
        >>> str(RayHealth().see({"raylet": "dead"}))
        "Ray's raylet died"
    """

    _silent: dict[str, int] = field(default_factory=dict)

    def see(self, looks: Mapping[str, Look]) -> Loss | None:
        """Take in one look at every server; the loss that it shows, the worst first."""
        for name, look in looks.items():
            self._silent[name] = self._silent.get(name, 0) + 1 if look == "silent" else 0
        losses = [Loss(name, "died") for name, look in looks.items() if look == "dead"] + [
            Loss(name, f"has not answered for {SILENT_LOOKS * LOOK_S:g} s")
            for name, silent in self._silent.items()
            if silent >= SILENT_LOOKS
        ]
        return min(losses, key=lambda loss: not loss.ends_actors, default=None)


def ray_servers(joined: bool) -> dict[str, Server]:
    """The servers that this driver's actors need, by name.

    Args:
        joined: Ray was running already, perhaps on other machines: its ports are tried then.
    """
    if not joined:
        return {
            f"{process.name()} (process {process.pid})": _process(process)
            for process in psutil.Process().children()
            if process.name() in RAY_SERVERS
        }
    import ray

    context = ray.get_runtime_context()
    host, _, port = context.gcs_address.rpartition(":")
    here = context.get_node_id()
    sockets = [node["RayletSocketName"] for node in ray.nodes() if node["NodeID"] == here]
    found = {f"GCS at {context.gcs_address}": _port(host.strip("[]"), int(port))}
    return found | {f"raylet at {socket}": _socket(socket) for socket in sockets}


def _process(process: psutil.Process) -> Server:
    async def look() -> Look:
        try:
            status = process.status() if process.is_running() else psutil.STATUS_DEAD
        except psutil.NoSuchProcess:
            return "dead"
        if status in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD):
            return "dead"
        return "silent" if status == psutil.STATUS_STOPPED else "alive"

    return look


def _port(host: str, port: int) -> Server:
    return lambda: _answers(asyncio.open_connection(host, port))


def _socket(path: str) -> Server:
    return lambda: _answers(asyncio.open_unix_connection(path))


async def _answers(
    connecting: Coroutine[object, object, tuple[asyncio.StreamReader, asyncio.StreamWriter]],
) -> Look:
    try:
        async with asyncio.timeout(CONNECT_S):
            _, writer = await connecting
    except (OSError, TimeoutError):
        return "silent"
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return "alive"


async def unless_ray_dies(
    work: Coroutine[object, object, T],
    servers: Mapping[str, Server],
    lost: Callable[[Loss], None] = lambda _: None,
    stop: Callable[[], None] | None = None,
) -> T:
    """The result of `work`, which is ended when one of Ray's servers is lost.

    Args:
        servers: What to look at; with none, nothing is watched.
        lost: Told of the loss before the work is cancelled.
        stop: Asks the work to end by itself, where actors still answer. None: it is cancelled then.

    Raises:
        RayLostError: One is lost; what the work raised about it does not matter then.
    """
    task, health = asyncio.ensure_future(work), RayHealth()
    loss: Loss | None = None
    try:
        while loss is None and not task.done():
            await asyncio.wait({task}, timeout=LOOK_S if servers else None)
            # Also once it has failed: an actor's death may be seen before what it died of.
            loss = await _look(servers, health)
    except asyncio.CancelledError:
        task.cancel()
        await asyncio.wait({task})
        raise
    if loss is None or (task.done() and not task.cancelled() and task.exception() is None):
        return task.result()
    # Seen: the loss explains it.
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    if stop is not None and not loss.ends_actors:
        # Without its GCS Ray may lose an answer and never say so.
        stop()
        await asyncio.wait({task}, timeout=SAVE_S)
    if not task.done():
        lost(loss)
        task.cancel()
        await asyncio.wait({task}, timeout=LEAVE_S)
    raise RayLostError(f"{loss}, and no run goes on without it; the ends of Ray's logs show why")


async def _look(servers: Mapping[str, Server], health: RayHealth) -> Loss | None:
    looks: Sequence[Look] = await asyncio.gather(*(look() for look in servers.values()))
    return health.see(dict(zip(servers, looks, strict=True)))
