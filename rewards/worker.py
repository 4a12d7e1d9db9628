"""RewardActor: judges groups in a child process that can be killed, each call under a deadline."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import platform
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from actors.records import Failure, Group, ScoredGroup, ScoreMeta
from rewards.base import RewardLoadError, combine, resolve_path
from rewards.child import receive, send
from rewards.config import RewardFunctionConfig, RewardsConfig
from rewards.environment import hide_environment, scrubbed_environment
from rewards.results import Verdict, failed, from_json, merged, reordered
from rewards.tasks import Task, TaskError

# Loading a function may import torch or read a model; it is not a hang before this.
START_TIMEOUT_S = 120.0
KILL_TIMEOUT_S = 10.0
# A completion that is judged alone gets at least this (or the whole deadline, if that is less).
ALONE_S = 1.0
MAX_REPLY = 64 << 20
BOOT = (
    "import sys; sys.path[:] = sys.argv[3:]; "
    "from rewards.child import main; main(int(sys.argv[1]), int(sys.argv[2]))"
)
# Metrics of the totals; a function of such a name would overwrite them.
TOTAL_METRICS = frozenset({"mean", "std", "zero_variance_fraction", "error_rate"})


@dataclass(frozen=True)
class RewardSpec:
    """A reward function: a unique name for metrics, where to load it, its factor in the total.

    The rest is as in RewardFunctionConfig.
    """

    name: str
    path: str
    weight: float = 1.0
    kind: str = "trl"
    options: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)
    secrets: tuple[str, ...] = ()
    sources: tuple[str, ...] = ()
    whole_group: bool = False


@dataclass(frozen=True)
class Judged:
    """What functions said of some completions of a group, and the seconds each took them."""

    ids: tuple[str, ...]
    verdicts: dict[str, tuple[Verdict, tuple[float, ...]]]


def reward_specs(task: Task, config: RewardsConfig, base: Path | None = None) -> list[RewardSpec]:
    """The functions that score this run: the config's, else the task's own.

    Names are the last part of the paths, numbered where they repeat. Relative files are made
    absolute from `base` (default: the current folder). Raises TaskError when there is no function,
    or none that counts.
    """
    chosen = task.rewards if config.functions is None else config.functions
    if not chosen:
        raise TaskError(
            f"no reward function: set rewards.functions ({type(task).__name__} has none of its "
            "own, or not for all of its rows)"
            if config.functions is None
            else "rewards.functions is an empty list: name a function, or leave it out"
        )
    specs: list[RewardSpec] = []
    for item in chosen:
        entry = RewardFunctionConfig(path=item, weight=1.0) if isinstance(item, str) else item
        stem = name = entry.path.rpartition(":")[2]
        number = 1
        while name in TOTAL_METRICS | {spec.name for spec in specs}:
            number += 1
            name = f"{stem}_{number}"
        path = resolve_path(entry.path, base or Path.cwd())
        try:
            json.dumps(entry.options)
        except TypeError as error:
            raise TaskError(
                f"rewards.functions: the options of {entry.path} must be plain values: {error}"
            ) from error
        given = entry.model_dump(exclude={"path", "weight", "secrets", "sources"})
        secrets, sources = tuple(entry.secrets), tuple(entry.sources)
        specs.append(
            RewardSpec(name, path, entry.weight, secrets=secrets, sources=sources, **given)
        )
    if all(spec.weight == 0 for spec in specs):
        raise TaskError("every reward function has weight 0: there is nothing to learn from")
    return specs


def longest_score_s(timeout_s: float, functions: int, group_size: int) -> float:
    """Seconds within which `RewardActor.score` answers, however its functions behave."""
    alone = 2 * max(timeout_s, group_size * ALONE_S)
    return functions * (timeout_s + alone + START_TIMEOUT_S + 2 * KILL_TIMEOUT_S)


class RewardActor:
    """Scores groups with a list of reward functions. To be wrapped by `ray.remote`.

    Keep max_concurrency at 1: there is one child process, and it judges one call at a time. The
    child runs the functions on its main thread (so signal.alarm works), in a session and process
    group of its own, with an environment of harmless variables, its output thrown away, its memory
    bounded to `memory_bytes`. A function that exceeds `timeout_s` in a call is ended by SIGKILL of
    that process group, and a new child takes over; so is a child that died. The kernel ties the
    child's life to the thread that created it: use the actor from one thread.

    Completions may be judged before their group is complete: `judge`, then `score` with what it
    said. A function that compares completions (`whole_group`) always gets the whole group.

    A call that hangs, dies or raises is repeated for each completion alone (but not for functions
    that compare), so that one completion costs only its own score. All of these share as much time
    again, each at most `timeout_s`; see `longest_score_s`.

    Raises RewardLoadError from the constructor when a function cannot be loaded.
    """

    def __init__(
        self,
        specs: Sequence[RewardSpec],
        timeout_s: float,
        start_timeout_s: float = START_TIMEOUT_S,
        memory_bytes: int | None = None,
    ) -> None:
        self._specs = tuple(specs)
        self._timeout_s = timeout_s
        self._start_timeout_s = start_timeout_s
        self._memory_bytes = memory_bytes
        # The child could read it in /proc.
        hide_environment()
        self._child: _Child | None = self._start()

    def judge(self, *parts: Group) -> tuple[Failure | None, Judged | None]:
        """Judge completions of a group as soon as they exist; for num_returns=2.

        parts: groups of one. Functions that compare completions (`whole_group`) are left to
        `score`. The Failure is as there.
        """
        part = replace(parts[0], completions=sum((p.completions for p in parts), ()))
        alone = [index for index, spec in enumerate(self._specs) if not spec.whole_group]
        found = self._verdicts(part, alone)
        if isinstance(found, Failure):
            return found, None
        return None, Judged(tuple(completion.id for completion in part.completions), found)

    def score(
        self, group: Group, *judged: Judged
    ) -> tuple[ScoreMeta | Failure, ScoredGroup | None]:
        """Judge a group with every function; for num_returns=2.

        judged: what `judge` said of its completions; a function that has said something of every
        one is not called again. Mistakes of reward functions are errors inside the result. A
        Failure is "data" when the group cannot be pickled, "infra" when no child process can be
        started.
        """
        started = time.monotonic()
        ids = [completion.id for completion in group.completions]
        known = joined(judged, ids)
        others = [index for index, spec in enumerate(self._specs) if spec.name not in known]
        found = self._verdicts(group, others)
        if isinstance(found, Failure):
            return found, None
        known |= found
        verdicts = {spec.name: known[spec.name][0] for spec in self._specs}
        times = tuple(map(sum, zip(*(seconds for _, seconds in known.values()), strict=True)))
        by_function = {name: verdict.values for name, verdict in verdicts.items()}
        errors = tuple(error for verdict in verdicts.values() for error in verdict.errors)
        weights = {spec.name: spec.weight for spec in self._specs}
        totals = combine(ids, by_function, weights, errors)
        parts = {f"{f}/{key}": row for f, v in verdicts.items() for key, row in v.parts.items()}
        extra = {f"{f}/{key}": row for f, v in verdicts.items() for key, row in v.extra.items()}
        logged = {f"{f}/{key}": row for f, v in verdicts.items() for key, row in v.metrics.items()}
        took = time.monotonic() - started
        scored = ScoredGroup(group, by_function, totals, errors, took, parts, extra, times)
        meta = ScoreMeta(group.id, totals, by_function, errors, took, parts, logged, times)
        return meta, scored

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

    def _start(self) -> _Child:
        return _Child(self._specs, self._start_timeout_s, self._memory_bytes)

    def _verdicts(
        self, group: Group, indices: Sequence[int]
    ) -> dict[str, tuple[Verdict, tuple[float, ...]]] | Failure:
        """What these functions say about a group, and the seconds each completion took them."""
        what, n = f"score {group.id}", len(group.completions)
        found: dict[str, tuple[Verdict, tuple[float, ...]]] = {}
        try:
            payload = _pickled(group) if indices else b""
            for index in indices:
                spec = self._specs[index]
                if spec.sources and group.prompt.source not in spec.sources:
                    found[spec.name] = Verdict((None,) * n), (0.0,) * n
                else:
                    verdict, seconds = self._judge(index, group, payload)
                    found[spec.name] = verdict, tuple(seconds)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            return Failure("data", what, f"cannot pickle the group: {error}")
        except (RewardLoadError, OSError) as error:
            return Failure("infra", what, f"cannot start a reward child: {error}")
        return found

    def _judge(self, index: int, group: Group, payload: bytes) -> tuple[Verdict, Sequence[float]]:
        """The verdict of function `index`, and the seconds that judging each completion took."""
        verdict, seconds = self._call(index, group, payload, self._timeout_s)
        n = len(group.completions)
        if not verdict.broke or n == 1 or self._specs[index].whole_group:
            return verdict, [seconds] * n
        verdict, alone = self._judge_alone(index, group)
        return verdict, [seconds + more for more in alone]

    def _judge_alone(self, index: int, group: Group) -> tuple[Verdict, list[float]]:
        """As `_judge`, one completion after the other, each with its share of what time is left."""
        n = len(group.completions)
        left = max(self._timeout_s, n * ALONE_S)
        give_up = time.monotonic() + 2 * left
        verdicts: list[Verdict] = []
        times: list[float] = []
        for done, completion in enumerate(group.completions):
            alone = replace(group, completions=(completion,))
            name = self._specs[index].name
            if time.monotonic() > give_up:
                # New children are slow to start here.
                message = f"{name}: no time was left to judge it alone (rewards.timeout_s)"
                verdict, seconds = failed(name, alone, "timeout", message), 0.0
            else:
                share = min(self._timeout_s, max(ALONE_S, left / (n - done)))
                verdict, seconds = self._call(index, alone, _pickled(alone), share)
            left -= seconds
            verdicts.append(verdict)
            times.append(seconds)
        return merged(verdicts), times

    def _call(
        self, index: int, group: Group, payload: bytes, timeout_s: float
    ) -> tuple[Verdict, float]:
        """One call of function `index` in the child, and how long it took."""
        # A child that died between two groups is no fault of this one.
        if self._child is not None and not self._child.alive():
            self.close()
        if self._child is None:
            self._child = self._start()
        name = self._specs[index].name
        began = time.monotonic()
        try:
            reply = self._child.call(index, payload, timeout_s)
            seconds = time.monotonic() - began
            if "failed" in reply:
                return failed(name, group, "raised", str(reply["failed"])), seconds
            return from_json(name, reply, len(group.completions)), seconds
        except TimeoutError:
            seconds = time.monotonic() - began
            self._replace()
            message = f"{name}: no answer within {timeout_s:.3g} s (rewards.timeout_s)"
            return failed(name, group, "timeout", message, broke=True), seconds
        except (EOFError, OSError, ValueError, TypeError) as error:
            # OSError: broken pipe. The others: a reply that is not ours.
            seconds = time.monotonic() - began
            ending = self._replace()
            message = f"{name}: its process {ending} ({error})"
            return failed(name, group, "died", message, broke=True), seconds

    def _replace(self) -> str:
        """Kill the child and start another; says how the old one ended."""
        assert self._child is not None
        child, self._child = self._child, None
        ending = child.kill()
        self._child = self._start()
        return ending


def joined(
    judged: Sequence[Judged], ids: Sequence[str]
) -> dict[str, tuple[Verdict, tuple[float, ...]]]:
    """One verdict a function out of what was said of single completions, in the order of `ids`;
    of the functions that said something of each."""
    arrived = [name for part in judged for name in part.ids]
    if not judged or set(arrived) != set(ids):
        return {}
    order = [arrived.index(name) for name in ids]
    found = {}
    for name in judged[0].verdicts:
        whole = merged([part.verdicts[name][0] for part in judged])
        seconds = [second for part in judged for second in part.verdicts[name][1]]
        found[name] = reordered(whole, order), tuple(seconds[place] for place in order)
    return found


def _pickled(group: Group) -> bytes:
    return pickle.dumps(group, protocol=pickle.HIGHEST_PROTOCOL)


class _Child:
    """One child process and the socket to it."""

    def __init__(
        self, specs: Sequence[RewardSpec], start_timeout_s: float, memory_bytes: int | None
    ) -> None:
        deadline = time.monotonic() + start_timeout_s
        secrets = {name for spec in specs for name in spec.secrets}
        unset = sorted(secrets - set(os.environ))
        if unset:
            raise RewardLoadError(
                f"{', '.join(unset)}: not set in the environment of {platform.node()}, and named "
                "in the secrets of rewards.functions"
            )
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
                env=scrubbed_environment(os.environ, secrets),
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
            theirs.close()
            try:
                functions = [asdict(spec) for spec in specs]
                hello = json.dumps({"functions": functions, "memory_bytes": memory_bytes})
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

    def call(self, index: int, payload: bytes, timeout_s: float) -> dict[str, Any]:
        """What function `index` said about a pickled group; see `rewards.child`.

        Raises TimeoutError, EOFError and OSError for a child that does not answer, ValueError or
        TypeError for an answer that is not ours.
        """
        deadline = time.monotonic() + timeout_s
        send(self._socket, struct.pack(">I", index) + payload, deadline)
        reply = json.loads(receive(self._socket, deadline, self.alive, MAX_REPLY))
        if not isinstance(reply, dict):
            raise ValueError("a garbled reply")
        return reply

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
