"""Joining a Ray cluster or starting one, with messages for what can go wrong."""

from __future__ import annotations

import logging
import os
import re
import socket
from pathlib import Path

from cohort.actors.process import start_sweeper
from cohort.cluster.config import Config
from cohort.cluster.errors import RayLostError, RunError, in_words
from cohort.cluster.files import require_writable
from cohort.cluster.placement import (
    Resources,
    connected_cluster,
    object_store_bytes,
    plan,
    this_machine,
)

CONNECT_TIMEOUT_S = 10
# Ray's addresses of a new cluster on this machine, and of one that is running here already.
OWN, RUNNING = "local", "auto"
HOST_PORT = re.compile(r"(\[[0-9a-fA-F:.%\w]+\]|[^\s:/\[\]]+):(\d{1,5})")
# The longest socket name below Ray's folder for temporary files, and the bytes that Linux allows.
SOCKET = "ray/session_2026-01-01_00-00-00_000000_{pid}/sockets/plasma_store"
LONGEST_SOCKET = 107


def ray_address(config: Config) -> str | None:
    """The cluster to join; None to start one."""
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    return None if address == OWN else address or None


def check_reachable(address: str) -> None:
    """Raise RunError unless the address is "auto", or host:port and something answers there.

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
            f"{what} is not the address of a Ray cluster: give host:port (usually HEAD:6379), auto "
            "for one that runs on this machine, or leave it empty to start Ray"
        )
    try:
        host, port = found[1].strip("[]"), int(found[2])
        socket.create_connection((host, port), CONNECT_TIMEOUT_S).close()
    except (OSError, UnicodeError) as error:
        raise RayLostError(f"{what}: cannot connect to Ray: {error}") from error


def check_start(config: Config, parameters: int | None = None, trained: int | None = None) -> None:
    """Raise RunError if it is clear already that Ray cannot be joined or started.

    Args:
        config: The run's config.
        parameters: Of the model; where given, this machine must also hold the run, when Ray is to
            be started on it.
        trained: Of its adapters; None: all parameters are trained.
    """
    if address := ray_address(config):
        check_reachable(address)
        return
    check_own_ray()
    if parameters is not None:
        plan(config, this_machine(), parameters, trained)


def check_own_ray() -> None:
    """Check what starting Ray needs of this machine. Raises RunError when something is missing."""
    folder = ray_folder()
    longest = len(os.fsencode(str(folder / SOCKET.format(pid=_longest_pid()))))
    if longest > LONGEST_SOCKET:
        raise RunError(
            f"{_named_folder()} is too long: Ray's sockets below it would have names of {longest} "
            f"bytes, and the system allows {LONGEST_SOCKET}: set RAY_TMPDIR to a shorter folder"
        )
    require_writable(
        folder / "ray",
        f"{_named_folder()}, where Ray keeps sockets and logs,",
        "set RAY_TMPDIR to a folder that can be written",
    )
    _check_home()


def connect(config: Config, here: Resources | None = None) -> Resources:
    """Join the Ray cluster, or start Ray on this machine.

    Args:
        config: The run's config.
        here: What this machine has, where that is known already.

    Returns:
        What the cluster or this machine has.

    Raises:
        RunError: Ray cannot be joined or started; RayLostError where a later try may succeed.
    """
    import ray

    address = ray_address(config)
    # Disable Ray's telemetry.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address:
        try:
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
        except Exception as error:
            raise RunError(_not_joined(address, error)) from error
        return connected_cluster()
    have = here or this_machine()
    check_own_ray()
    start_sweeper()
    try:
        ray.init(
            # Otherwise Ray would join a cluster that runs on this machine.
            address=OWN,
            num_cpus=int(have.cpus),
            include_dashboard=False,
            object_store_memory=object_store_bytes(have),
            logging_level=logging.ERROR,
            log_to_driver=False,
        )
    except Exception as error:
        ray.shutdown()
        raise RayLostError(
            f"Ray did not start on this machine: {in_words(error)}\nIts logs are in "
            f"{ray_folder() / 'ray' / 'session_latest' / 'logs'}"
        ) from error
    return have


def ray_folder() -> Path:
    """The folder in which Ray makes its own, `ray`."""
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp")


def _not_joined(address: str, error: Exception) -> str:
    what, message = _named(address), in_words(error)
    if "version mismatch" in message.lower():
        return (
            f"{what}: the cluster has another version of Ray or Python than this environment. "
            f"Install the same ones on both. {message}"
        )
    if address == RUNNING:
        return f"{what}: no Ray runs on this machine: {message}"
    return f"{what}: cannot connect to Ray: {message}"


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
        require_writable(
            folder,
            f"HOME={folder.parent}, where Ray keeps a token (.ray),",
            "set HOME to a folder that can be written",
        )
