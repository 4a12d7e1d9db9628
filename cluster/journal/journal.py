"""The driver's face of the journal: keeps what is scored, and puts back what was kept.

A group is written as soon as it is scored, in the background. Before a step is trained its record
follows, and all of it is on the disk; then the learner may begin. A run that goes on from a
checkpoint is given the groups of the steps behind it again, in their order, and generates only what
was not scored yet.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

from cohort.actors.records import Failure, Request, ScoredRef
from cohort.cluster.journal.actor import JournalActor, Limits, NotWritten
from cohort.cluster.journal.history import History
from cohort.cluster.journal.records import Head, Place, StepRecord, WeightsRecord
from cohort.cluster.journal.segments import JournalError, read_group
from cohort.learner.learner import LostGroups

if TYPE_CHECKING:
    from ray.actor import ActorHandle

# A record that takes longer hangs: its actor is replaced.
STALLED_S = 120.0
ATTEMPTS = 3
# How long the end of a run waits for groups that were scored and are not trained any more.
SETTLE_S = 10.0

R = TypeVar("R")


class StepGroups(Protocol):
    """What the journal needs of a step's batch."""

    @property
    def step(self) -> int: ...
    @property
    def groups(self) -> list[ScoredRef]: ...
    @property
    def failed(self) -> tuple[tuple[str, Failure], ...]: ...


class Journal:
    """The journal of a run; one driver at a time.

    Args:
        folder: journal/ of the run.
        head: Names the run in every segment.
        limits: How much of the past is kept.
        past: What the folder holds of this run already.
        first_step: The step that the run goes on with.
        note: Says a line to people.

    Attributes:
        replaced: How often the process that writes was replaced.
    """

    def __init__(
        self,
        folder: Path,
        head: Head,
        limits: Limits,
        past: History,
        first_step: int,
        note: Callable[[str], None],
    ) -> None:
        self._folder = folder
        self._head = head
        self._limits = limits
        self._note = note
        self._weights = dict(past.weights)
        self._ahead = past.ahead_of(first_step)
        self._writing: dict[str, asyncio.Task[Place | NotWritten]] = {}
        self._seeds: dict[str, int] = {}
        # One record after the other: the deadline of each is its own.
        self._turn = asyncio.Lock()
        self._said_large = False
        self.replaced = 0
        self._actor = self._make()

    def _make(self) -> ActorHandle[JournalActor]:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        actor = (
            ray.remote(JournalActor)
            .options(num_cpus=0, scheduling_strategy=here)
            .remote(str(self._folder), self._head, self._limits)
        )
        return cast("ActorHandle[JournalActor]", actor)

    @property
    def ahead(self) -> int:
        """How many groups are there to be put back."""
        return sum(
            len(item.groups) if isinstance(item, StepRecord) else len(item)
            for item in self._ahead.values()
        )

    # What was kept.

    def recall(self, request: Request) -> ScoredRef | Failure | None:
        """What was got for this very request, by an earlier driver or before the objects of it were
        lost; None: it is to be generated.

        Raises:
            JournalError: It is there and cannot be read.
        """
        import ray

        place = self._place(request)
        if not isinstance(place, Place):
            return place
        name = request.group_id
        record = read_group(self._folder, place)
        group = record.scored.group
        if (record.seed, group.prompt.token_ids, len(group.completions)) != (
            request.sampling.seed,
            request.prompt.token_ids,
            request.sampling.n,
        ):
            return None
        if not isinstance(self._ahead.get(request.step), StepRecord) and not record.is_sound:
            # What has failed may work by now; in a step that was trained it counts as it is.
            return None
        self._seeds[name] = record.seed
        self._writing[name] = _done(place)
        return ScoredRef(record.meta, record.scores, ray.put(record.scored))

    def _place(self, request: Request) -> Place | Failure | None:
        """Where the group of a request lies, or why there is none."""
        ahead, name = self._ahead.get(request.step), request.group_id
        written = self._writing.get(name)
        if written is not None and written.done() and not written.cancelled():
            place = written.result()
            return place if isinstance(place, Place) else None
        if isinstance(ahead, StepRecord):
            return dict(ahead.failed).get(name) or dict(ahead.groups).get(name)
        return (ahead or {}).get(name)

    # What is kept.

    def keep(self, request: Request, scored: ScoredRef) -> None:
        """Begin to write a group that was scored."""
        self._seeds[request.group_id] = request.sampling.seed
        self._begin(request.step, scored)

    def _begin(self, step: int, scored: ScoredRef) -> asyncio.Task[Place | NotWritten]:
        name = scored.meta.group_id
        task: asyncio.Task[Place | NotWritten] = asyncio.create_task(
            self._ask(
                lambda actor: actor.put_group.remote(
                    step, self._seeds[name], scored.meta, scored.scores, [scored.ref]
                )
            )
        )
        self._writing[name] = task
        return task

    async def before(self, batch: StepGroups) -> None:
        """Write what a step is about to train; all of it is on the disk when this returns.

        Raises:
            LostGroups: The completions of some groups were gone before they could be written.
            JournalError: There is no room. Nothing of the step has been trained.
        """
        lost, groups = [], []
        for scored in batch.groups:
            name = scored.meta.group_id
            place = await self._writing[name]
            if isinstance(place, NotWritten) and place.kind == "disk":
                # There may be room by now.
                place = await self._begin(batch.step, scored)
            if not isinstance(place, NotWritten):
                groups.append((name, place))
            elif place.kind == "lost":
                lost.append(name)
            else:
                raise self._no_room(batch.step, place)
        if lost:
            raise LostGroups(lost)
        record = StepRecord(batch.step, tuple(groups), batch.failed)
        size: int | NotWritten = await self._ask(lambda actor: actor.put_step.remote(record))
        if isinstance(size, NotWritten):
            raise self._no_room(batch.step, size)
        if size > self._limits.limit_bytes and not (self._said_large or self._limits.keep_all):
            self._said_large = True
            self._note(
                f"step {batch.step}: journal/ has {size / 2**30:.1f} GiB, more than run.journal_gb="
                f"{self._limits.limit_bytes / 2**30:g}, and a resume needs all of it until the next"
                " checkpoint (run.checkpoint_every)"
            )

    def places(self, batch: StepGroups) -> list[Place]:
        """Where the groups of a step lie for which `before` has returned."""
        tasks = [self._writing[scored.meta.group_id] for scored in batch.groups]
        return [place for task in tasks if isinstance(place := task.result(), Place)]

    async def after(self, step: int, version: int, fingerprint: str) -> None:
        """Write what a step has led to. What is there of the step's past is compared with it."""
        known = self._weights.pop(step, None)
        if known is not None and known.fingerprint != fingerprint:
            self._note(
                f"step {step} was trained again from the journal and led to other weights than "
                "before: another number of threads, another machine or other packages"
            )
        record = WeightsRecord(step, version, fingerprint)
        written: NotWritten | None = await self._ask(lambda actor: actor.put_weights.remote(record))
        if isinstance(written, NotWritten):
            self._note(f"step {step}: its weights' fingerprint was not written: {written.message}")

    def forget(self, batch: StepGroups) -> None:
        """The step is trained and recorded."""
        self._ahead.pop(batch.step, None)
        for scored in batch.groups:
            del self._writing[scored.meta.group_id], self._seeds[scored.meta.group_id]

    async def rotate(self) -> None:
        """Begin a new segment. Raises nothing: what cannot be parted is only removed later."""
        with contextlib.suppress(JournalError):
            await self._ask(lambda actor: actor.rotate.remote())

    async def trim(self, checkpoints: Sequence[int]) -> None:
        """Remove what is not needed any more.

        Raises nothing: the next checkpoint is another occasion, and the next step needs the journal
        and says what is wrong with it.

        Args:
            checkpoints: Steps of the complete ones, in order.
        """
        failed: NotWritten | None
        try:
            failed = await self._ask(lambda actor: actor.trim.remote(checkpoints))
        except JournalError as error:
            failed = NotWritten("disk", str(error))
        if isinstance(failed, NotWritten):
            self._note(f"old parts of journal/ could not be removed: {failed.message}")

    async def settle(self) -> None:
        """Wait a while until what was scored is written, before a run ends. Raises nothing."""
        writing = [task for task in self._writing.values() if not task.done()]
        if writing:
            await asyncio.wait(writing, timeout=SETTLE_S)
        for task in self._writing.values():
            if not task.cancel() and not task.cancelled():
                task.exception()  # seen; the run has ended

    def _kill_actor(self) -> None:
        import ray

        ray.kill(self._actor)

    async def _ask(self, call: Callable[[ActorHandle[JournalActor]], Awaitable[R]]) -> R:
        """The actor's answer; one that died or hangs is replaced and asked again.

        Raises:
            JournalError: It dies again and again.
        """
        from ray.exceptions import RayError, RayTaskError

        async with self._turn:
            why = ""
            for _ in range(ATTEMPTS):
                try:
                    return await asyncio.wait_for(_answer(call(self._actor)), STALLED_S)
                except RayTaskError:
                    raise
                except (RayError, TimeoutError) as error:
                    why = f"{type(error).__name__}: {error}".strip().splitlines()[0]
                    self._kill_actor()
                    self.replaced += 1
                    self._note(f"the process that writes journal/ was replaced: {why}")
                    self._actor = self._make()
        raise JournalError(f"the process that writes {self._folder} died {ATTEMPTS} times: {why}")

    def _no_room(self, step: int, why: NotWritten) -> JournalError:
        return JournalError(
            f"step {step} is not trained, because its groups could not be written to "
            f"{self._folder}: {why.message}. Make room there; run.resume=true then goes on. "
            "run.journal_gb bounds what is kept of the past"
        )


async def _answer(call: Awaitable[R]) -> R:
    return await call


def _done(place: Place) -> asyncio.Task[Place | NotWritten]:
    async def found() -> Place | NotWritten:
        return place

    return asyncio.create_task(found())
