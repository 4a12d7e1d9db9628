"""RewardActor: judges groups in a child process that can be killed, each call under a deadline."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import platform
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.records import Failure, Group, RewardError, ScoredGroup, ScoreMeta
from rewards.base import RewardLoadError, Verdict, combine, failed, resolve_path
from rewards.child import receive, send
from rewards.config import RewardFunctionConfig, RewardsConfig
from rewards.tasks import Task, TaskError

# Loading a function may import torch or read a model; it is not a hang before this.
START_TIMEOUT_S = 120.0
KILL_TIMEOUT_S = 10.0
MAX_REPLY = 64 << 20
SECRET = re.compile(r"(TOKEN|SECRET|KEY|PASSWORD|PASSWD|CREDENTIALS)$", re.IGNORECASE)
BOOT = (
    "import sys; sys.path[:] = sys.argv[3:]; "
    "from rewards.child import main; main(int(sys.argv[1]), int(sys.argv[2]))"
)


@dataclass(frozen=True)
class RewardSpec:
    """A reward function: a unique name for metrics, where to load it, its factor in the total."""

    name: str
    path: str
    weight: float = 1.0


def reward_specs(task: Task, config: RewardsConfig, base: Path | None = None) -> list[RewardSpec]:
    """The functions that score this run: the config's, else the task's own.

    Names are the last part of the paths, numbered where they repeat. Relative files are made
    absolute from `base` (default: the current folder). Raises TaskError when there is no function,
    or none that counts.
    """
    chosen = task.rewards if config.functions is None else config.functions
    if not chosen:
        raise TaskError(
            f"no reward function: set rewards.functions ({type(task).__name__} has none of its own)"
            if config.functions is None
            else "rewards.functions is an empty list: name a function, or leave it out"
        )
    specs: list[RewardSpec] = []
    for item in chosen:
        entry = RewardFunctionConfig(path=item, weight=1.0) if isinstance(item, str) else item
        stem = name = entry.path.rpartition(":")[2]
        number = 1
        while name in {spec.name for spec in specs}:
            number += 1
            name = f"{stem}_{number}"
        path = resolve_path(entry.path, base or Path.cwd())
        specs.append(RewardSpec(name, path, entry.weight))
    if all(spec.weight == 0 for spec in specs):
        raise TaskError("every reward function has weight 0: there is nothing to learn from")
    return specs


def scrubbed_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment without variables whose names say that they hold a secret."""
    return {name: value for name, value in environment.items() if not SECRET.search(name)}


class RewardActor:
    """Scores groups with a list of reward functions. To be wrapped by `ray.remote`.

    Keep max_concurrency at 1: there is one child process, and it judges one group at a time. The
    child runs the functions on its main thread (so signal.alarm works), in a session and process
    group of its own, without secrets in its environment, its output thrown away. A function that
    exceeds `timeout_s` on a group is ended by SIGKILL of that process group, and a new child takes
    over; so is a child that died. The kernel ties the child's life to the thread that created it:
    use the actor from one thread.

    Raises RewardLoadError from the constructor when a function cannot be loaded.
    """

    def __init__(
        self,
        specs: Sequence[RewardSpec],
        timeout_s: float,
        start_timeout_s: float = START_TIMEOUT_S,
    ) -> None:
        self._specs = tuple(specs)
        self._timeout_s = timeout_s
        self._start_timeout_s = start_timeout_s
        self._child: _Child | None = _Child(self._specs, start_timeout_s)

    def score(self, group: Group) -> tuple[ScoreMeta | Failure, ScoredGroup | None]:
        """Judge a group with every function; for num_returns=2.

        Mistakes of reward functions are errors inside the result. A Failure is "data" when the
        group cannot be pickled, "infra" when no child process can be started.
        """
        started = time.monotonic()
        what = f"score {group.id}"
        try:
            payload = pickle.dumps(group, protocol=pickle.HIGHEST_PROTOCOL)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            return Failure("data", what, f"cannot pickle the group: {error}"), None
        by_function: dict[str, tuple[float | None, ...]] = {}
        errors: list[RewardError] = []
        for index, spec in enumerate(self._specs):
            try:
                verdict = self._judge(index, spec.name, group, payload)
            except (RewardLoadError, OSError) as error:
                return Failure("infra", what, f"cannot start a reward child: {error}"), None
            by_function[spec.name] = verdict.values
            errors += verdict.errors
        weights = {spec.name: spec.weight for spec in self._specs}
        ids = [completion.id for completion in group.completions]
        totals = combine(ids, by_function, weights, errors)
        seconds = time.monotonic() - started
        scored = ScoredGroup(group, by_function, totals, tuple(errors), seconds)
        return ScoreMeta(group.id, totals, by_function, scored.errors, seconds), scored

    def ping(self) -> str:
        """A sign of life that says where the actor runs."""
        return f"reward actor {os.getpid()} on {platform.node()}"

    def pids(self) -> tuple[int, int | None]:
        """The process ids of the actor and of its child; None while it has no child."""
        return os.getpid(), None if self._child is None else self._child.pid

    def close(self) -> None:
        """End the child process."""
        if self._child is not None:
            self._child.kill()
            self._child = None

    def _judge(self, index: int, name: str, group: Group, payload: bytes) -> Verdict:
        # A child that died between two groups is no fault of this one.
        if self._child is not None and not self._child.alive():
            self.close()
        if self._child is None:
            self._child = _Child(self._specs, self._start_timeout_s)
        try:
            reply = self._child.call(index, payload, self._timeout_s)
        except TimeoutError:
            self._replace()
            message = f"{name}: no answer within {self._timeout_s:g} s (rewards.timeout_s)"
            return failed(name, group, "timeout", message)
        except (EOFError, OSError, ValueError, KeyError, TypeError) as error:
            # OSError: broken pipe. The others: a reply that is not ours.
            ending = self._replace()
            return failed(name, group, "died", f"{name}: its process {ending} ({error})")
        if isinstance(reply, str):
            return failed(name, group, "raised", reply)
        values, items = reply
        if len(values) != len(group.completions):
            return failed(name, group, "died", f"{name}: its process sent a garbled reply")
        return Verdict(tuple(values), tuple(RewardError(name, *item) for item in items))

    def _replace(self) -> str:
        """Kill the child and start another; says how the old one ended."""
        assert self._child is not None
        child, self._child = self._child, None
        ending = child.kill()
        self._child = _Child(self._specs, self._start_timeout_s)
        return ending


class _Child:
    """One child process and the socket to it."""

    def __init__(self, specs: Sequence[RewardSpec], start_timeout_s: float) -> None:
        deadline = time.monotonic() + start_timeout_s
        self._socket, theirs = socket.socketpair()
        # What the child says before it is ready explains why it never was.
        with theirs, tempfile.TemporaryFile() as words:
            paths = [entry or os.getcwd() for entry in sys.path]
            # -P and the explicit path: the child imports what this process imports, and the
            # current folder comes last, so that nothing in it shadows a module.
            here = [] if os.getcwd() in paths else [os.getcwd()]
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-c", BOOT),
                    *(str(theirs.fileno()), str(os.getpid()), *paths, *here),
                ],
                stdin=subprocess.DEVNULL,
                stdout=words,
                stderr=words,
                env=scrubbed_environment(os.environ),
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
            theirs.close()
            try:
                hello = json.dumps([(spec.name, spec.path) for spec in specs])
                send(self._socket, hello.encode(), deadline)
                reply = json.loads(receive(self._socket, deadline, self.alive, MAX_REPLY))
            except (EOFError, OSError) as error:
                ending = self.kill()
                words.seek(max(0, words.seek(0, os.SEEK_END) - 2000))
                said = words.read().decode(errors="replace").strip()
                paths_shown = ", ".join(spec.path for spec in specs)
                late = f"was not ready after {start_timeout_s:g} s"
                how = late if isinstance(error, TimeoutError) else ending
                raise RewardLoadError(
                    f"the process that loads {paths_shown} {how}: {said or 'it said nothing'}"
                ) from error
        if "error" in reply:
            self.kill()
            raise RewardLoadError(reply["error"])

    @property
    def pid(self) -> int:
        return self._process.pid

    def alive(self) -> bool:
        """Whether the process runs. It is not reaped, so its process group's id stays ours."""
        if self._process.returncode is not None:
            return False
        try:
            ended = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return False
        return ended is None

    def call(self, index: int, payload: bytes, timeout_s: float) -> tuple[list[Any], Any] | str:
        """The values and errors of function `index` on a pickled group, or why it got no group.

        Raises TimeoutError, EOFError and OSError for a child that does not answer, ValueError,
        KeyError or TypeError for an answer that is not ours.
        """
        deadline = time.monotonic() + timeout_s
        send(self._socket, struct.pack(">I", index) + payload, deadline)
        reply = json.loads(receive(self._socket, deadline, self.alive, MAX_REPLY))
        if "failed" in reply:
            return str(reply["failed"])
        return list(reply["values"]), reply["errors"]

    def kill(self) -> str:
        """SIGKILL the child's whole process group, and wait for it; says how the child ended."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
        self._socket.close()
        code = self._process.wait(KILL_TIMEOUT_S)
        if code >= 0:
            return f"exited with code {code}"
        return f"was killed by {signal.Signals(-code).name}"
