"""Joining a Ray cluster, or starting a Ray of our own; what can go wrong there, said in words."""

from __future__ import annotations

import logging
import os
import re
import socket
import tempfile
from pathlib import Path
from typing import Any

from cohort.actors.process import start_sweeper
from cohort.cluster.config import Config
from cohort.cluster.errors import RunError
from cohort.cluster.placement import Resources, connected_cluster, object_store_bytes, this_machine
from cohort.learner.checkpoint import nearest_existing

CONNECT_TIMEOUT_S = 10
# Ray's address of a new cluster on this machine, of one that is running here already.
OWN, RUNNING = "local", "auto"
HOST_PORT = re.compile(r"(\[[0-9a-fA-F:.%\w]+\]|[^\s:/\[\]]+):(\d{1,5})")
# The longest socket that Ray makes below its folder for temporary files, and what Linux allows.
SOCKET = "ray/session_2026-01-01_00-00-00_000000_{pid}/sockets/plasma_store"
LONGEST_SOCKET = 107


def ray_address(config: Config) -> str | None:
    """The cluster to join; None for a Ray of our own."""
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    return None if address == OWN else address or None


def check_reachable(address: str) -> None:
    """Raise RunError unless it is host:port and somebody answers there, or "auto".

    Ray itself would try for minutes.
    """
    if address == RUNNING:
        return
    what = _named(address)
    if address.startswith("ray://"):
        raise RunError(
            f"{what}: Ray Client cannot hold a run. Run on a machine of the cluster with its "
            "address host:6379, or use `cohort submit` with the dashboard's, http://HEAD:8265"
        )
    if address.startswith(("http://", "https://")):
        raise RunError(
            f"{what}: the address of a dashboard, which `cohort submit` takes; a run joins "
            "host:6379"
        )
    found = HOST_PORT.fullmatch(address)
    if found is None or not 0 < int(found[2]) < 65536:
        raise RunError(
            f"{what} is no address of a Ray cluster: give host:port (usually HEAD:6379), auto for "
            "one that runs on this machine, or nothing for a Ray of its own"
        )
    try:
        host, port = found[1].strip("[]"), int(found[2])
        socket.create_connection((host, port), CONNECT_TIMEOUT_S).close()
    except (OSError, UnicodeError) as error:
        raise RunError(f"{what}: cannot connect to Ray: {error}") from error


def check_start(config: Config) -> None:
    """Raise RunError for what can be known to keep Ray from being joined or started."""
    address = ray_address(config)
    if address:
        check_reachable(address)
    else:
        check_own_ray()


def check_own_ray() -> None:
    """Try what a Ray of our own needs of this machine. Raises RunError when it could not start."""
    folder = ray_folder()
    longest = len(os.fsencode(str(folder / SOCKET.format(pid=_longest_pid()))))
    if longest > LONGEST_SOCKET:
        raise RunError(
            f"{_named_folder()} is too long: Ray's sockets below it would have names of {longest} "
            f"bytes, and the system allows {LONGEST_SOCKET}: set RAY_TMPDIR to a shorter folder"
        )
    _require_writable(
        folder / "ray",
        f"{_named_folder()}, where Ray keeps sockets and logs,",
        "set RAY_TMPDIR to a folder that can be written",
    )
    _check_home()


def connect(config: Config, here: Resources | None = None) -> Resources:
    """Join the Ray cluster, or start a Ray of our own on this machine; what it offers.

    here: what this machine has, where that is known. Raises RunError.
    """
    import ray

    address = ray_address(config)
    options: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    # Ray reports how it is used to its makers unless told not to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address:
        try:
            ray.init(address=address, **options)
        except Exception as error:
            raise RunError(_not_joined(address, error)) from error
        return connected_cluster()
    have = here or this_machine()
    check_own_ray()
    start_sweeper()
    try:
        ray.init(
            # Without it Ray would join a cluster that somebody started on this machine.
            address=OWN,
            num_cpus=int(have.cpus),
            include_dashboard=False,
            object_store_memory=object_store_bytes(have),
            **options,
        )
    except Exception as error:
        ray.shutdown()
        raise RunError(
            f"Ray did not start on this machine: {_told(error)}\nIts logs are in "
            f"{ray_folder() / 'ray' / 'session_latest' / 'logs'}"
        ) from error
    return have


def ray_folder() -> Path:
    """Where Ray makes its folder `ray`."""
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp")


def _not_joined(address: str, error: Exception) -> str:
    what, told = _named(address), _told(error)
    if "version mismatch" in told.lower():
        return (
            f"{what}: the cluster has another version of Ray or Python than this environment. "
            f"Install the same ones on both. {told}"
        )
    if address == RUNNING:
        return f"{what}: no Ray runs on this machine: {told}"
    return f"{what}: cannot connect to Ray: {told}"


def _named(address: str) -> str:
    given = os.environ.get("RAY_ADDRESS")
    where = " (from RAY_ADDRESS)" if address == given else ""
    return f"cluster.address={address}{where}"


def _named_folder() -> str:
    for name in ("RAY_TMPDIR", "TMPDIR"):
        if value := os.environ.get(name):
            return f"{name}={value}"
    return "/tmp"


def _longest_pid() -> str:
    try:
        return "9" * len(str(int(Path("/proc/sys/kernel/pid_max").read_text(encoding="utf-8")) - 1))
    except (OSError, ValueError):
        return "9999999"


def _check_home() -> None:
    """Ray writes a token into ~/.ray when it starts a cluster."""
    if os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH"):
        return
    try:
        folder = Path.home() / ".ray"
    except RuntimeError as error:
        raise RunError(
            f"HOME is not set, and Ray keeps a token there: set HOME: {error}"
        ) from error
    if not (folder / "auth_token").is_file():
        _require_writable(
            folder,
            f"HOME={folder.parent}, where Ray keeps a token (.ray),",
            "set HOME to a folder that can be written",
        )


def _require_writable(folder: Path, what: str, advice: str) -> None:
    """Raise RunError unless a file can be made in the folder, or the nearest that is there."""
    place = nearest_existing(folder)
    try:
        # Gone when it is closed.
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise RunError(f"{what} cannot be written: {error.strerror} ({place}): {advice}") from error


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
