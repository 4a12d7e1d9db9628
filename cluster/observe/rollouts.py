"""rollouts/step-NNNNNN.jsonl: every completion of a step with its scores, one a line.

An actor writes them from the journal, so that no completion passes through the driver.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypedDict

from cohort.actors.errors import failure_of
from cohort.actors.plain import JsonObject
from cohort.actors.records import Completion, Messages, ScoredGroup
from cohort.actors.turns import FinishReason
from cohort.cluster.files import replacing
from cohort.cluster.journal.records import Place
from cohort.cluster.journal.segments import read_group
from cohort.cluster.observe.metrics_file import plain

# How often a slow write is asked for its progress, and how long it may make none. How long it takes
# in all does not matter: a step may have gigabytes of completions.
ASK_S = 5.0
STALLED_S = 120.0
ATTEMPTS = 2


class RolloutWriterError(Exception):
    """A step's completions could not be written; the message says why."""


class RolloutError(TypedDict):
    """Why a reward function gave a completion no value."""

    function: str
    cause: str
    message: str


class TurnRow(TypedDict):
    """One turn of an episode, see `TurnShape` and `Turn` in `cohort.actors.records`."""

    parent: int | None
    kept: int
    inserted_ids: list[int]
    tokens: int
    weight_versions: list[int]
    finish_reason: FinishReason
    reward: float | None


class EpisodeRow(TypedDict):
    """How an episode went.

    Attributes:
        messages: All that follow the prompt.
    """

    stop_reason: str
    failure: str | None
    metrics: dict[str, float | None]
    messages: list[JsonObject]
    turns: list[TurnRow]


class RolloutRow(TypedDict):
    """One completion: its prompt, its text, its scores.

    `reward` is the weighted total, `by_function` the value of each function, `parts` and `extra`
    what functions returned besides, as in ScoredGroup; `reward_s` the seconds of its scoring.
    `weight_versions` are those of its first and its last token. Of an episode `completion` is the
    last reply, and `token_ids` are the sampled tokens of all turns; `episode` is None where there
    was no environment.
    """

    step: int
    group_id: str
    prompt_id: str
    completion_id: str
    prompt: Messages | str
    completion: str
    reward: float | None
    by_function: dict[str, float | None]
    parts: dict[str, float | None]
    extra: dict[str, object]
    reward_s: float | None
    errors: list[RolloutError]
    finish_reason: FinishReason
    weight_versions: list[int]
    seed: int
    prompt_tokens: int
    tokens: int
    token_ids: list[int]
    episode: EpisodeRow | None


def rollout_rows(step: int, scored: ScoredGroup) -> list[RolloutRow]:
    """The rows of a group, one a completion."""
    group = scored.group
    return [
        {
            "step": step,
            "group_id": group.id,
            "prompt_id": group.prompt.id,
            "completion_id": completion.id,
            "prompt": group.prompt.content,
            "completion": completion.text,
            "reward": plain("reward", scored.totals[i]),
            "by_function": {
                name: plain(name, values[i]) for name, values in scored.by_function.items()
            },
            "parts": {name: plain(name, row[i]) for name, row in scored.parts.items()},
            "extra": {name: row[i] for name, row in scored.extra.items()},
            "reward_s": scored.sample_s[i] if scored.sample_s else None,
            "errors": [
                {"function": e.function, "cause": e.cause, "message": e.message}
                for e in scored.errors
                if e.completion_id == completion.id
            ],
            "finish_reason": completion.finish_reason,
            "weight_versions": [int(v) for v in completion.weight_versions],
            "seed": int(completion.seed),
            "prompt_tokens": len(group.prompt.token_ids),
            "tokens": len(completion.token_ids),
            "token_ids": [int(t) for t in completion.token_ids],
            "episode": _episode(completion),
        }
        for i, completion in enumerate(group.completions)
    ]


def _episode(completion: Completion) -> EpisodeRow | None:
    end = completion.end
    if end is None:
        return None
    return {
        "stop_reason": end.stop_reason,
        "failure": None if end.failure is None else f"{end.failure.stage}: {end.failure.message}",
        "metrics": {name: plain(name, value) for name, value in end.metrics.items()},
        "messages": list(end.messages),
        "turns": [
            {
                "parent": turn.shape.parent,
                "kept": turn.shape.kept,
                "inserted_ids": turn.inserted_ids.tolist(),
                "tokens": turn.shape.sampled,
                "weight_versions": [int(v) for v in turn.weight_versions],
                "finish_reason": turn.finish_reason,
                "reward": plain("reward", turn.reward),
            }
            for turn in completion.turns
        ],
    }


def transcript(row: Mapping[str, Any]) -> str:
    """What a person reads of a row: the completion, or all messages of an episode with the reward
    of each turn, and why it ended."""
    episode = row.get("episode")
    if not episode:
        return str(row["completion"])
    rewards = iter(turn["reward"] for turn in episode["turns"])
    lines = []
    for message in episode["messages"]:
        role, content = message["role"], str(message["content"])
        for call in message.get("tool_calls", ()):
            function = call["function"]
            arguments = json.dumps(function["arguments"], ensure_ascii=False)
            content += f"\n-> {function['name']}({arguments})"
        given = role == "assistant" and message.get("given", False)
        earned = next(rewards, None) if role == "assistant" and not given else None
        role += " (given)" * given
        lines.append(f"[{role}] {content}" + ("" if earned is None else f"  (reward {earned:g})"))
    failure = episode["failure"]
    lines.append(f"[end] {episode['stop_reason']}" + (f": {failure}" if failure else ""))
    return "\n".join(lines)


@contextlib.contextmanager
def rollout_file(folder: Path, step: int) -> Iterator[Callable[[ScoredGroup], list[RolloutRow]]]:
    """Write folder/step-NNNNNN.jsonl group by group: the function adds one, returns its rows.

    The file is there when the block has ended, whole, or not at all.
    """
    with replacing(folder / f"step-{step:06d}.jsonl") as file:

        def add(scored: ScoredGroup) -> list[RolloutRow]:
            rows = rollout_rows(step, scored)
            for row in rows:
                text = json.dumps(row, ensure_ascii=False) + "\n"
                # Half a surrogate pair, which a dataset may hold, has no UTF-8; as an escape it
                # is JSON.
                file.write(text.encode("utf-8", "backslashreplace"))
            return rows

        yield add


def table_rows(rows: Sequence[RolloutRow], limit: int) -> list[RolloutRow]:
    """At most `limit` of a step's rows: the first completion of every group, then the second ..."""
    seen: dict[str, int] = {}
    ranked = []
    for row in rows:
        rank = seen.get(row["group_id"], 0)
        seen[row["group_id"]] = rank + 1
        ranked.append((rank, row))
    return [row for _, row in islice(sorted(ranked, key=lambda item: item[0]), limit)]


class RolloutWriter:
    """One small Ray actor on the driver's node; the driver gets back only the rows it shows.

    An actor that died or makes no progress is replaced.

    Args:
        folder: rollouts/ of the run.
        journal: journal/ of the run, where the completions come from.
        rows_shown: Completions of a step in the W&B table.
        table_every: Steps between tables.
        show: Is given them, with the step.

    Attributes:
        replaced: How often the actor was replaced.
    """

    def __init__(
        self,
        folder: Path,
        journal: Path,
        rows_shown: int,
        table_every: int,
        show: Callable[[int, Sequence[RolloutRow]], None],
    ) -> None:
        self._folder = folder
        self._journal = journal
        self._rows_shown = rows_shown
        self._table_every = table_every
        self._show = show
        self.replaced = 0
        self._actor = self._make()

    def _make(self) -> Any:  # Ray's types know methods of an actor only as plain functions
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        return (
            ray.remote(_Writer)
            # Two calls at a time: one writes, the other reports progress.
            .options(num_cpus=0, scheduling_strategy=here, max_concurrency=2)
            .remote(str(self._folder), str(self._journal), self._rows_shown)
        )

    async def write(self, step: int, groups: Sequence[Place]) -> None:
        """Write a step's groups to rollouts/step-NNNNNN.jsonl; every few steps a W&B table, too.

        Raises:
            RolloutWriterError: They could not be written.
        """
        from ray.exceptions import RayTaskError

        why = ""
        for _ in range(ATTEMPTS):
            try:
                rows = await self._patiently(self._actor.write.remote(step, groups))
            except Exception as error:  # noqa: BLE001 - sorted here
                why = failure_of(error, "the rollout writer").message.strip().splitlines()[-1]
                if isinstance(error, RayTaskError):
                    break  # the actor lives, and would fail again
                self._replace()
            else:
                if step % self._table_every == 0:
                    self._show(step, rows)
                return
        raise RolloutWriterError(f"rollouts/step-{step:06d}.jsonl was not written: {why}")

    async def _patiently(self, writing: Awaitable[list[RolloutRow]]) -> list[RolloutRow]:
        """The answer to `write`, as long as there is progress; raises TimeoutError without any."""
        answer = asyncio.ensure_future(writing)
        seen, still_s = -1, 0.0
        try:
            while True:
                done, _ = await asyncio.wait({answer}, timeout=ASK_S)
                if done:
                    return answer.result()
                still_s += ASK_S
                with contextlib.suppress(TimeoutError):
                    progress = await asyncio.wait_for(self._actor.progress.remote(), ASK_S)
                    if progress != seen:
                        seen, still_s = progress, 0.0
                if still_s >= STALLED_S:
                    raise TimeoutError(f"nothing was written for {STALLED_S:.0f} s")
        finally:
            answer.cancel()

    def _replace(self) -> None:
        self.kill()
        self.replaced += 1
        self._actor = self._make()

    def kill(self) -> None:
        """End the actor."""
        import ray

        ray.kill(self._actor)


class _Writer:
    """The actor.

    Args:
        folder: Where the files go.
        journal: Where the groups are.
        rows_shown: At most so many rows of a step are returned.
    """

    def __init__(self, folder: str, journal: str, rows_shown: int) -> None:
        self._folder = Path(folder)
        self._journal = Path(journal)
        self._rows_shown = rows_shown
        self._done = 0

    def write(self, step: int, groups: Sequence[Place]) -> list[RolloutRow]:
        """Write a step's file; returns the rows to show."""
        shown: list[RolloutRow] = []
        with rollout_file(self._folder, step) as add:
            # One after the other: this process should not hold a whole step, which may be large.
            for group in groups:
                scored = read_group(self._journal, group).scored
                shown += table_rows(add(scored), self._rows_shown)
                self._done += 1
        return table_rows(shown, self._rows_shown)

    def progress(self) -> int:
        """Groups written so far, over all steps."""
        return self._done
