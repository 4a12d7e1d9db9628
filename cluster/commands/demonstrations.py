"""Demonstrations of a task as groups to learn from; those of episodes are played."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from cohort.actors.engine import RawCompletion
from cohort.actors.play import Player
from cohort.actors.records import (
    Completion,
    EpisodeHost,
    Group,
    GroupMeta,
    Prompt,
    Request,
    SamplingSpec,
    ScoredGroup,
    ScoredRef,
    ScoreMeta,
    derive_seed,
)
from cohort.cluster.prepare import Prepared
from cohort.rewards.tasks import Demonstrates, Row, TaskError, sample_rows


@dataclass(frozen=True)
class Shown:
    """A demonstration of a row.

    Attributes:
        row_id: Of the row.
        prompt: The row's.
        replies: Tokens of each reply, with the end-of-sequence token. One, except in an episode.
        text: Of the last reply.
    """

    row_id: str
    prompt: Prompt
    replies: tuple[tuple[int, ...], ...]
    text: str


def demonstrations(prepared: Prepared, examples: int) -> Iterator[Shown]:
    """Endless demonstrations of training rows; the seed decides the order.

    Every epoch holds each row once, in its own order. Rows without a demonstration are left out,
    and so are those too long for the run if task.overlong=drop.

    Args:
        prepared: The task, its prompts and the config.
        examples: Training rows that demonstrations are taken from; 0: all.

    Raises:
        TaskError: The task has no demonstrations, or one is too long and task.overlong=error.
    """
    task, seed = prepared.task, prepared.config.run.seed
    size = task.train_size()
    rows = [row for _, row in sample_rows(task, seed, 0, min(examples or size, size))]
    epoch = 0
    while True:
        found = 0
        for row in rows:
            shown = demonstration(prepared, row, epoch)
            if shown is not None:
                found += 1
                yield shown
        if not found:
            raise _none_there(prepared)
        epoch += 1
        random.Random(derive_seed(seed, "warmup", epoch)).shuffle(rows)


def demonstration(prepared: Prepared, row: Row, epoch: int) -> Shown | None:
    """What the model would generate for the row; None where there is nothing to show.

    Raises:
        TaskError: As of `demonstrations`, or it is no text.
    """
    config = prepared.config
    if not isinstance(prepared.task, Demonstrates):
        raise _none_there(prepared)
    found = prepared.task.demonstration(row, epoch)
    if found is None:
        return None
    several = isinstance(found, list)
    texts = found if isinstance(found, list) else [found]
    if several and config.task.environment is None:
        raise TaskError(
            f"row {row.id}: its demonstration has several replies, and task.environment is not set"
        )
    if not texts or not all(isinstance(text, str) for text in texts):
        kinds = "a text, a list of texts or None"
        raise TaskError(f"row {row.id}: a demonstration must be {kinds}, got {found!r}")
    prompt = prepared.renderer.render(row, epoch)
    # The prompt may begin the first answer.
    texts = [texts[0].removeprefix(prompt.prefill), *texts[1:]]
    replies = tuple(prepared.renderer.continuation(text) for text in texts)
    most = max(len(reply) for reply in replies)
    longest = prepared.renderer.max_prompt_tokens
    too_long = most > config.actors.max_tokens
    if too_long and config.task.overlong == "error":
        raise TaskError(
            f"row {row.id}: {'a reply of ' if several else ''}its demonstration has {most} tokens, "
            f"more than actors.max_tokens={config.actors.max_tokens}: raise that, or set "
            "task.overlong=drop"
        )
    if too_long or (longest is not None and len(prompt.token_ids) > longest):
        return None
    return Shown(row.id, prompt, replies, texts[-1])


async def as_group(shown: Shown, host: EpisodeHost | None = None, max_length: int = 0) -> ScoredRef:
    """A group of one completion: the demonstration, played where there is an environment.

    Behaviour log-probs are NaN, so that any use of them shows.

    Args:
        shown: The demonstration.
        host: Where the environment runs; None: there is none.
        max_length: Tokens of the longest sequence.

    Raises:
        TaskError: The episode failed, or did not end with the last reply.
    """
    if host is None:
        completion = _completion(shown)
    else:
        completion = await _played(shown, host, max_length)
    group = Group(shown.prompt.id, shown.prompt, (completion,))
    # Cross-entropy does not use the reward's value; completions without a reward are not trained.
    scored = ScoredGroup(group, {}, totals=(1.0,))
    scores = ScoreMeta(shown.prompt.id, scored.totals, {}, (), 0.0)
    return ScoredRef(GroupMeta.of(group, "demonstration", 0.0), scores, scored)


def scored_tokens(group: Group) -> Iterator[tuple[list[int], list[range]]]:
    """Sequences of a group of one completion, and where in them its own tokens stand.

    Every token of the completion is in one of them, and there are as few as can be: turns that
    extend one another are one sequence.
    """
    [completion] = group.completions
    prompt, sampled = list(group.prompt.token_ids), completion.token_ids.tolist()
    if not completion.turns:
        yield [*prompt, *sampled], [range(len(prompt), len(prompt) + len(sampled))]
        return
    sequences: list[list[int]] = []
    own: list[list[range]] = []
    extended: set[int] = set()
    start = 0
    for turn in completion.turns:
        shape = turn.shape
        before = prompt if shape.parent is None else sequences[shape.parent]
        whole = shape.parent is not None and shape.kept == len(before)
        ids = [*before[: shape.kept], *turn.inserted_ids.tolist()]
        spans = [range(len(ids), len(ids) + shape.sampled)]
        if whole and shape.parent is not None and shape.parent not in extended:
            extended.add(shape.parent)
            spans = [*own[shape.parent], *spans]
        sequences.append([*ids, *sampled[start : start + shape.sampled]])
        own.append(spans)
        start += shape.sampled
    yield from (
        (ids, spans)
        for at, (ids, spans) in enumerate(zip(sequences, own, strict=True))
        if at not in extended
    )


def _completion(shown: Shown) -> Completion:
    [reply] = shown.replies
    return Completion(
        id=f"{shown.prompt.id}/shown",
        prompt_id=shown.prompt.id,
        token_ids=np.array(reply, dtype=np.int64),
        logprobs=np.full(len(reply), math.nan, dtype=np.float32),
        finish_reason="stop",
        seed=0,
        weight_versions=(0, 0),
        text=shown.text,
    )


async def _played(shown: Shown, host: EpisodeHost, max_length: int) -> Completion:
    """The episode in which the model says what is shown."""
    left = list(shown.replies)

    async def say(
        _id: str, token_ids: Sequence[int], _sampling: SamplingSpec, _greedy: bool
    ) -> tuple[RawCompletion, tuple[int, int]]:
        if not left:
            raise TaskError(
                f"row {shown.row_id}: the episode of its demonstration goes on after the last of "
                f"{len(shown.replies)} replies"
            )
        reply = left.pop(0)
        if len(token_ids) + len(reply) > max_length:
            raise TaskError(
                f"row {shown.row_id}: the episode of its demonstration is longer than "
                f"{max_length} tokens: raise model.max_length"
            )
        logprobs = np.full(len(reply), math.nan, dtype=np.float32)
        return RawCompletion(np.array(reply, dtype=np.int64), logprobs, "stop", 0), (0, 0)

    seed = derive_seed(0, "demonstration", shown.prompt.id)
    sampling = SamplingSpec(max_tokens=max_length, temperature=1.0, n=1, seed=seed)
    request = Request(shown.prompt.id, shown.prompt, sampling, host=host)
    played = await Player(request, 0, host, say, lambda _: shown.text, max_length, version=0).play()
    assert played.end is not None
    if played.end.failure is not None:
        raise TaskError(
            f"row {shown.row_id}: the episode of its demonstration failed: "
            f"{played.end.failure.message}"
        )
    if left:
        raise TaskError(
            f"row {shown.row_id}: the episode of its demonstration ended ("
            f"{played.end.stop_reason}) before the last {len(left)} of {len(shown.replies)} replies"
        )
    return played


def _none_there(prepared: Prepared) -> TaskError:
    return TaskError(
        f"task.name={prepared.config.task.name} has no demonstrations to learn from: its class "
        "needs a method demonstration(row, epoch) that returns a text; see Demonstrates in "
        "rewards/tasks.py"
    )
