"""Run a config on a Ray cluster elsewhere, as a Ray job, and follow its log.

The working directory (configs, task and reward code, and this package when it is a checkout) is
uploaded; everything else - Python, the installed packages, the model, the storage of run.dir - is
the cluster's. `python` is the one on the PATH of the cluster's head node.

Secrets never travel with a job: what is in a runtime_env can be read by everyone who sees the
dashboard. WANDB_API_KEY, HF_TOKEN and the like belong into the environment of the cluster's own
processes (a Kubernetes secret, the shell that runs `ray start`).
"""

from __future__ import annotations

import asyncio
import os
import shlex
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cohort.actors.errors import CohortError
from cohort.cluster.config_file import load_config

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

EXCLUDES = [
    ".git",
    ".venv",
    "venv",
    "runs",
    "wandb",
    "__pycache__",
    ".mypy_cache",
    ".pytest_cache",
    ".ruff_cache",
    # A link to what is uploaded as `cohort`.
    "/src/cohort",
]
REACH_S = 10.0
"""Longest wait for the job server to answer at all."""
SAVE_S = 300
"""How long a stopped job may take to save a checkpoint; Ray's own default of 3 s loses the work."""
SILENCE_S = 120.0
"""Longest time without contact to the cluster before following is given up."""
INTERRUPTED = 130


class SubmitError(CohortError):
    """The job cannot be submitted or followed; the message says what to do."""


def submit(
    config_path: Path,
    address: str,
    overrides: list[str],
    *,
    working_dir: Path,
    follow: bool = True,
    supervise: bool = False,
) -> int:
    """Submit `cohort train CONFIG OVERRIDES` as a Ray job.

    Args:
        config_path: The config file, inside `working_dir`.
        address: Of the Ray dashboard, `http://HEAD:8265`.
        overrides: `section.key=value` each.
        working_dir: The folder to upload.
        follow: Stream the job's log to stdout until it ends. Ctrl-C stops the job, which saves a
            checkpoint first; a second Ctrl-C leaves it.
        supervise: Have the job start its driver again when that is lost.

    Returns:
        The job's exit code; 0 once it is submitted without `follow`, 130 after Ctrl-C.

    Raises:
        ConfigError: The config is wrong.
        SubmitError: Anything else that can be known before the job starts: paths, an unreachable
            cluster, a folder too large to upload.
    """
    words = job_words(config_path, overrides, working_dir, supervise)
    return run_job(words, address, working_dir, follow)


def run_job(words: Sequence[str], address: str, working_dir: Path, follow: bool = True) -> int:
    """Run a `cohort` command as a Ray job.

    Args:
        words: Of the command, after `cohort`.
        address, working_dir, follow: As in `submit`.

    Returns:
        As `submit`.

    Raises:
        SubmitError: The cluster cannot be reached, or refuses the job.
    """
    entrypoint = shlex.join(["python", "-m", "cohort.cluster.cli", *words])
    address = address if "://" in address else f"http://{address}"
    _check_address(address)

    from ray.job_submission import JobSubmissionClient

    try:
        client = JobSubmissionClient(address)
        job_id = client.submit_job(
            entrypoint=entrypoint,
            runtime_env={
                "working_dir": str(working_dir),
                "excludes": EXCLUDES,
                "env_vars": {"PYTHONUNBUFFERED": "1", "RAY_JOB_STOP_WAIT_TIME_S": str(SAVE_S)},
            },
        )
    except Exception as error:  # Ray raises RuntimeError, ValueError, requests' and its own
        raise SubmitError(_explain(error, address, working_dir)) from error
    print(f"submitted {job_id} to {address}: {entrypoint}", flush=True)
    if not follow:
        print(f"follow it with: ray job logs --address {address} --follow {job_id}", flush=True)
        return 0
    follower = _Follower(client, job_id, address)
    try:
        return follower.run()
    except KeyboardInterrupt:
        print(f"\nstopping {job_id}: it saves a checkpoint first (Ctrl-C: leave it)", flush=True)
        client.stop_job(job_id)
    try:
        follower.run()
    except KeyboardInterrupt:
        print(f"left {job_id}, which may still be saving", flush=True)
    return INTERRUPTED


def job_words(
    config_path: Path, overrides: list[str], working_dir: Path, supervise: bool = False
) -> list[str]:
    """The job's command, after `cohort` and after checking all that can be checked here.

    Raises:
        ConfigError: The config is wrong.
        SubmitError: `working_dir` is not a folder, the config would not be uploaded with it, or
            run.dir is not absolute.
    """
    if not working_dir.is_dir():
        raise SubmitError(f"the working directory {working_dir} is not a folder")
    config = load_config(config_path, overrides)
    folder = working_dir.resolve()
    try:
        relative = config_path.resolve().relative_to(folder)
    except ValueError as error:
        raise SubmitError(
            f"{config_path} is not inside the working directory {folder}, which is what the "
            "cluster gets: move the config there, or submit from a folder that contains it"
        ) from error
    left_out = sorted(set(relative.parts) & set(EXCLUDES))
    if left_out:
        raise SubmitError(f"{config_path} is in '{left_out[0]}', which is never uploaded")
    if not Path(config.run.dir).is_absolute():
        raise SubmitError(
            f"run.dir={config.run.dir} is not absolute: on a cluster it must name storage that "
            "every node reaches and that outlives the job, e.g. run.dir=/runs/my-run"
        )
    words = ["train", relative.as_posix(), *overrides]
    return [*words, "--supervise"] if supervise else words


def _check_address(address: str) -> None:
    if not address.startswith(("http://", "https://")):
        raise SubmitError(f"{address} is not the address of a Ray dashboard: give http://HEAD:8265")
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        other = os.environ.get(name)
        if other and other.rstrip("/") != address.rstrip("/"):
            # Ray lets the variable win over the argument without a word.
            raise SubmitError(f"{name}={other} would replace {address}: unset it")
    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}/api/version", timeout=REACH_S):
            pass
    except urllib.error.HTTPError:
        return  # something answers; Ray's client says more (a missing token, an old version)
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        raise SubmitError(
            f"no Ray job server answers at {address} ({reason}): it is the dashboard's address, "
            "http://HEAD:8265, and the cluster needs ray[default]"
        ) from error


def _explain(error: Exception, address: str, working_dir: Path) -> str:
    text = str(error)
    if "exceeds the maximum size" in text or "status code 413" in text:
        sizes = {entry.name: _size(entry) for entry in working_dir.iterdir()}
        largest = sorted(sizes, key=lambda name: -sizes[name])
        listed = ", ".join(f"{name} {sizes[name] / 2**20:.0f} MiB" for name in largest[:3])
        return (
            f"the working directory {working_dir} is too large: Ray takes 512 MiB, compressed. "
            f"The largest entries are {listed}. Move data and models to storage of the cluster, "
            "or name them in .gitignore or .rayignore"
        )
    return f"{address} refused the job: {text}"


def _size(path: Path) -> int:
    if path.name in EXCLUDES:
        return 0
    if not path.is_dir():
        return path.lstat().st_size
    return sum(_size(entry) for entry in path.iterdir() if not entry.is_symlink())


class _Follower:
    """Streams one job's log to stdout and waits for its end, over lost connections."""

    def __init__(self, client: JobSubmissionClient, job_id: str, address: str) -> None:
        self._client = client
        self._job_id = job_id
        self._address = address
        self._printed = 0

    def run(self) -> int:
        """Follow the job to its end.

        Returns:
            Its exit code.

        Raises:
            SubmitError: There was no contact to the cluster for SILENCE_S.
        """
        heard = time.monotonic()
        while True:
            printed = self._printed
            trouble = "the log ended before the job did"
            try:
                asyncio.run(self._stream())
                info = self._client.get_job_info(self._job_id)
                if info.status.is_terminal():
                    return self._result(info)
                heard = time.monotonic()
            except Exception as error:  # noqa: BLE001  aiohttp's, requests' and Ray's; retried
                trouble = f"{type(error).__name__}: {error}"
            if self._printed > printed:
                heard = time.monotonic()
            if time.monotonic() - heard > SILENCE_S:
                raise SubmitError(
                    f"lost contact with {self._job_id} ({trouble}). It may still be running: "
                    f"ray job logs --address {self._address} --follow {self._job_id}"
                )
            time.sleep(1)

    async def _stream(self) -> None:
        # Every connection starts at the beginning of the log.
        seen = 0
        async for chunk in self._client.tail_job_logs(self._job_id):
            fresh = chunk[max(0, self._printed - seen) :]
            seen += len(chunk)
            if fresh:
                print(fresh, end="", flush=True)
                self._printed = seen

    def _result(self, info: JobDetails) -> int:
        print(f"{self._job_id}: {info.status.value}", flush=True)
        if info.status.value == "SUCCEEDED":
            return 0
        if info.status.value == "STOPPED":
            return INTERRUPTED
        if not info.driver_exit_code:
            # It failed before or outside of our program, so the log does not say why.
            print(info.message, flush=True)
        return info.driver_exit_code or 1
