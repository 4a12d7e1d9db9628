"""RewardWorker: scores groups in a child process that can be killed, each call with a deadline."""

from __future__ import annotations

import os
import pickle
import platform
import tempfile
import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, TypeAlias

from cohort.actors.process import MARKER, start_watcher
from cohort.actors.records import Failure, Group, Place, ScoredGroup, ScoreMeta
from cohort.actors.turns import ENVIRONMENT
from cohort.actors.witness import node_id
from cohort.rewards.base import RewardLoadError, combine, out_of_range
from cohort.rewards.booting import KILL_TIMEOUT_S
from cohort.rewards.environment import hide_environment, scrubbed_environment
from cohort.rewards.environments.scores import environment_scores, turn_rewards
from cohort.rewards.process import Child
from cohort.rewards.result_json import from_json
from cohort.rewards.results import RewardResult, error_tail, failed, merged, reordered
from cohort.rewards.specs import RewardSpec

# Loading a function may import torch or read a model.
START_TIMEOUT_S = 120.0
# A completion that is scored alone gets at least this (or the whole deadline, if that is less).
ALONE_S = 1.0
# Of one function: its result, and the seconds that it took for each completion.
Timed: TypeAlias = tuple[RewardResult, tuple[float, ...]]


@dataclass(frozen=True)
class ScoredPart:
    """Scores of some completions of a group.

    Attributes:
        ids: Of these completions.
        results: By the name of the function.
    """

    ids: tuple[str, ...]
    results: dict[str, Timed]


def longest_score_s(timeout_s: float, functions: int, group_size: int) -> float:
    """Seconds within which `RewardWorker.score` answers, however its functions behave.

    Args:
        timeout_s: Seconds for one call of a function.
        functions: How many there are.
        group_size: Completions of a group.
    """
    alone = 2 * max(timeout_s, group_size * ALONE_S)
    return functions * (2 * timeout_s + alone + START_TIMEOUT_S + 3 * KILL_TIMEOUT_S)


class RewardWorker:
    """Scores groups with a list of reward functions. To be wrapped by `ray.remote`.

    One method may run at a time, and `ping` beside it. One child process runs the functions, on its
    main thread (so signal.alarm works), in a session and process group of its own, with an
    environment of harmless variables and without output. A function that exceeds `timeout_s` in a
    call is ended by SIGKILL of the child and of all that it started, in whatever session, and a new
    child takes over; so is a child that died. The kernel ties the child's life to the thread that
    created it: use the worker from one thread. A watcher ends what a killed worker leaves behind.

    Completions may be scored before their group is complete: call `score_part`, then `score` with
    the results. That is for functions that score each completion by itself
    (`cohort.rewards.base.per_completion`, or `whole_group` False in their spec); others may
    compare, and get the whole group.

    A call that hangs, dies or raises is repeated for each completion alone, so that one completion
    costs only its own score. Where the function may compare, the completions that it could score
    alone are then scored together, without the others. All of these calls share as much time again,
    each at most `timeout_s`; see `longest_score_s`. A function with `whole_group` True is never
    called with part of a group.

    Args:
        specs: The functions.
        timeout_s: Seconds for one call of a function.
        start_timeout_s: Seconds for loading the functions.
        memory_bytes: Of the child process; None: no bound.
        max_steps: Of the run, for functions that ask for TRL's `trainer_state`.

    Raises:
        RewardLoadError: A function cannot be loaded.
    """

    def __init__(
        self,
        specs: Sequence[RewardSpec],
        timeout_s: float,
        start_timeout_s: float = START_TIMEOUT_S,
        memory_bytes: int | None = None,
        max_steps: int = 0,
    ) -> None:
        self._specs = tuple(specs)
        self._timeout_s = timeout_s
        self._start_timeout_s = start_timeout_s
        self._memory_bytes = memory_bytes
        self._max_steps = max_steps
        # In the environment of all that the child starts; the watcher looks for it.
        self._marker = uuid.uuid4().hex
        self._watcher: IO[bytes] | None = None
        self._doing = ""
        self._since = time.monotonic()
        # The child could read this process's environment in /proc.
        hide_environment()
        self._child: Child | None = self._start()
        self._streams = tuple(
            per_completion if spec.whole_group is None else not spec.whole_group
            for spec, per_completion in zip(self._specs, self._child.per_completion, strict=True)
        )

    @property
    def streams(self) -> tuple[bool, ...]:
        """For each function, whether it scores completions as they come."""
        return self._streams

    @property
    def specs(self) -> list[RewardSpec]:
        """The functions; `whole_group` is filled in for those that declare it themselves."""
        return [
            replace(spec, whole_group=False) if streams else spec
            for spec, streams in zip(self._specs, self._streams, strict=True)
        ]

    def score_part(self, *parts: Group) -> tuple[Failure | None, ScoredPart | None]:
        """Score completions of a group as soon as they exist; for num_returns=2.

        Args:
            parts: Groups of one completion.

        Returns:
            (None, the scores), without those of functions that may compare completions; or a
            Failure as from `score`, and None.
        """
        part = replace(parts[0], completions=sum((p.completions for p in parts), ()))
        alone = [index for index, streams in enumerate(self._streams) if streams]
        found = self._results(part, alone)
        if isinstance(found, Failure):
            return found, None
        return None, ScoredPart(tuple(completion.id for completion in part.completions), found)

    def score(
        self, group: Group, *scored_parts: ScoredPart
    ) -> tuple[ScoreMeta | Failure, ScoredGroup | None]:
        """Score a group with every function; for num_returns=2.

        Args:
            group: The group.
            scored_parts: Results of `score_part`. Functions with scores of every completion are not
                called again.

        Returns:
            What the driver may see, and the scored group; mistakes of reward functions are errors
            inside. Or a Failure and None: of kind "data" when the group cannot be pickled, "infra"
            when no child process can be started.
        """
        started = time.monotonic()
        ids = [completion.id for completion in group.completions]
        known = joined(scored_parts, ids)
        others = [index for index, spec in enumerate(self._specs) if spec.name not in known]
        found = self._results(group, others)
        if isinstance(found, Failure):
            return found, None
        known |= found
        results = {spec.name: known[spec.name][0] for spec in self._specs}
        times = tuple(
            sum(seconds[place] for _, seconds in known.values()) for place in range(len(ids))
        )
        by_function = {name: result.values for name, result in results.items()}
        weights = {spec.name: spec.weight for spec in self._specs}
        errors = tuple(error for result in results.values() for error in result.errors)
        errors += tuple(out_of_range(ids, by_function, weights))
        given, failures = environment_scores(group)
        if given:
            by_function[ENVIRONMENT], weights[ENVIRONMENT] = given, 1.0
            errors += failures
        totals = combine(ids, by_function, weights, errors)
        parts = {f"{f}/{key}": row for f, v in results.items() for key, row in v.parts.items()}
        extra = {f"{f}/{key}": row for f, v in results.items() for key, row in v.extra.items()}
        logged = {f"{f}/{key}": row for f, v in results.items() for key, row in v.metrics.items()}
        took = time.monotonic() - started
        scored = ScoredGroup(group, by_function, totals, errors, took, parts, extra, times)
        meta = ScoreMeta(
            group.id, totals, by_function, errors, took, parts, logged, times, turn_rewards(group)
        )
        return meta, scored

    def ping(self) -> str:
        """Where the worker runs and what it is doing; from any thread."""
        doing, seconds = self._doing, time.monotonic() - self._since
        at = f", {seconds:.1f} s into {doing}" if doing else ""
        return f"reward worker {os.getpid()} on {platform.node()}{at}"

    def place(self) -> Place:
        """Where the worker runs; from any thread."""
        return Place(node_id(), (), os.getpid())

    def pids(self) -> tuple[int, int | None]:
        """The process ids of the worker and of its child; None while it has no child."""
        return os.getpid(), None if self._child is None else self._child.pid

    def close(self) -> None:
        """End the child process and all that it started."""
        self._end_child()
        if self._watcher is not None:
            self._watcher.close()
            self._watcher = None

    def _end_child(self) -> str:
        """Kill the child, if there is one; says how it ended."""
        child, self._child = self._child, None
        return "ended" if child is None else child.kill()

    def _start(self) -> Child:
        if self._watcher is None:
            self._stubs = Path(tempfile.mkdtemp(prefix="cohort-modules-"))
            self._watcher = start_watcher(self._marker, self._stubs)
        allowed = {name for spec in self._specs for name in spec.secrets}
        unset = sorted(allowed - set(os.environ))
        if unset:
            raise RewardLoadError(
                f"{', '.join(unset)}: not set in the environment of {platform.node()}, and named "
                "in the secrets of rewards.functions"
            )
        hello = {
            "functions": [asdict(spec) for spec in self._specs],
            "memory_bytes": self._memory_bytes,
            "stubs": str(self._stubs),
            "max_steps": self._max_steps,
        }
        environment = scrubbed_environment(os.environ, allowed) | {MARKER: self._marker}
        self._at("loading its reward functions")
        try:
            return Child(hello, environment, self._start_timeout_s)
        finally:
            self._at("")

    def _at(self, doing: str) -> None:
        self._doing, self._since = doing, time.monotonic()

    def _results(self, group: Group, indices: Sequence[int]) -> dict[str, Timed] | Failure:
        """The scores of these functions for a group."""
        what, n = f"score {group.id}", len(group.completions)
        found: dict[str, Timed] = {}
        try:
            payload = _pickled(group) if indices else b""
            for index in indices:
                spec = self._specs[index]
                if spec.sources and group.prompt.source not in spec.sources:
                    found[spec.name] = RewardResult((None,) * n), (0.0,) * n
                else:
                    result, seconds = self._score_function(index, group, payload)
                    found[spec.name] = result, tuple(seconds)
        except _NotPickled as error:
            return Failure("data", what, str(error))
        except (RewardLoadError, OSError) as error:
            return Failure("infra", what, f"cannot start a reward child: {error}")
        return found

    def _score_function(
        self, index: int, group: Group, payload: bytes
    ) -> tuple[RewardResult, Sequence[float]]:
        """The result of function `index`, and its seconds for each completion."""
        result, seconds = self._call(index, group, payload, self._timeout_s)
        n = len(group.completions)
        if not result.broke or n == 1 or self._specs[index].whole_group:
            return result, [seconds] * n
        alone, times = self._score_alone(index, group)
        good = [place for place, item in enumerate(alone) if not item.broke]
        if not self._streams[index] and len(good) > 1:
            # Alone, a function that compares has nothing to compare with.
            rest = replace(group, completions=tuple(group.completions[place] for place in good))
            result, more = self._call(index, rest, _pickled(rest), self._timeout_s)
            for place in good:
                times[place] += more
            bad = [place for place in range(n) if place not in good]
            order = [*good, *bad]
            whole = merged([result, *(alone[place] for place in bad)])
            result = reordered(whole, [order.index(place) for place in range(n)])
        else:
            result = merged(alone)
        return result, [seconds + more for more in times]

    def _score_alone(self, index: int, group: Group) -> tuple[list[RewardResult], list[float]]:
        """A result for each completion, scored one after the other, and its seconds."""
        n = len(group.completions)
        left = max(self._timeout_s, n * ALONE_S)
        give_up = time.monotonic() + 2 * left
        results: list[RewardResult] = []
        times: list[float] = []
        for done, completion in enumerate(group.completions):
            alone = replace(group, completions=(completion,))
            name = self._specs[index].name
            if time.monotonic() > give_up:
                # New children are slow to start here.
                message = (
                    f"{name}: no time was left to score it alone "
                    f"(rewards.timeout_s={self._timeout_s:g})"
                )
                result, seconds = failed(name, alone, "timeout", message, broke=True), 0.0
            else:
                seconds_each = min(self._timeout_s, max(ALONE_S, left / (n - done)))
                result, seconds = self._call(index, alone, _pickled(alone), seconds_each)
            left -= seconds
            results.append(result)
            times.append(seconds)
        return results, times

    def _call(
        self, index: int, group: Group, payload: bytes, timeout_s: float
    ) -> tuple[RewardResult, float]:
        """One call of function `index` in the child, and how long it took."""
        # This group must not fail because of what the child did after its last call.
        if self._child is not None and not self._child.is_ready():
            self._end_child()
        if self._child is None:
            self._child = self._start()
        name = self._specs[index].name
        first, more = group.completions[0].id, len(group.completions) - 1
        self._at(f"{name} on {first}" + (f" and {more} more" if more else ""))
        began = self._since
        try:
            reply = self._child.call(index, payload, timeout_s)
            seconds = time.monotonic() - began
            if "failed" in reply:
                return failed(name, group, "raised", str(reply["failed"])), seconds
            ids = {completion.id for completion in group.completions}
            return from_json(name, reply, len(group.completions), ids), seconds
        except TimeoutError:
            seconds = time.monotonic() - began
            self._end_child()
            self._child = self._start()
            key = "(rewards.timeout_s)"
            if timeout_s < self._timeout_s:
                key = f"for this completion alone (rewards.timeout_s={self._timeout_s:g})"
            message = f"{name}: no answer within {timeout_s:.3g} s {key}"
            return failed(name, group, "timeout", message, broke=True), seconds
        except (EOFError, OSError, ValueError, TypeError, RecursionError, MemoryError) as error:
            # OSError: broken pipe. The others: a forged reply.
            seconds = time.monotonic() - began
            ending = self._end_child()
            self._child = self._start()
            message = f"{name}: its process {ending} ({error})"
            return failed(name, group, "died", message, broke=True), seconds
        finally:
            self._at("")


class _NotPickled(Exception):
    """A group cannot be sent to the child process."""


def joined(scored_parts: Sequence[ScoredPart], ids: Sequence[str]) -> dict[str, Timed]:
    """The scores of a group from those of its parts.

    Args:
        scored_parts: Results of `RewardWorker.score_part`.
        ids: All completions of the group, in order.

    Returns:
        By the name of the function; {} when a completion is missing.
    """
    arrived = [name for part in scored_parts for name in part.ids]
    if not scored_parts or set(arrived) != set(ids):
        return {}
    order = [arrived.index(name) for name in ids]
    found = {}
    for name in scored_parts[0].results:
        whole = merged([part.results[name][0] for part in scored_parts])
        seconds = [second for part in scored_parts for second in part.results[name][1]]
        found[name] = reordered(whole, order), tuple(seconds[place] for place in order)
    return found


def _pickled(group: Group) -> bytes:
    try:
        return pickle.dumps(group, protocol=pickle.HIGHEST_PROTOCOL)
    # Columns may hold objects of foreign code, and anything may be nested too deep.
    except Exception as error:
        raise _NotPickled(f"cannot pickle the group: {error_tail(error, 300)}") from error
