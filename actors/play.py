"""Playing an episode: the model's turns in one engine, the environment's answers between them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np

from cohort.actors.engine import RawCompletion
from cohort.actors.records import Completion, EpisodeHost, Request, SamplingSpec, derive_seed
from cohort.actors.turns import CUT, EpisodeEnd, NextTurn, Turn, TurnShape

# An episode that was lost with its worker is begun again once, with the same seeds.
ATTEMPTS = 2


class Sample(Protocol):
    """Samples what follows some tokens; also the weight versions that it began and ended with."""

    def __call__(
        self, request_id: str, token_ids: Sequence[int], spec: SamplingSpec, greedy: bool, /
    ) -> Awaitable[tuple[RawCompletion, tuple[int, int]]]: ...


async def play(
    request: Request,
    index: int,
    host: EpisodeHost,
    sample: Sample,
    text: Callable[[np.ndarray], str],
    max_length: int,
    version: int,
) -> Completion:
    """Play one episode of a group to its end.

    Args:
        request: The group's.
        index: Of the episode in its group.
        host: Where the environment runs.
        sample: Samples a turn.
        text: Tokens as rewards read them.
        max_length: Tokens of the longest sequence that the engine takes.
        version: Of the weights as the episode begins.

    Returns:
        The episode; one that failed has `end.failure`, and what it sampled is left out.
    """
    for attempt in range(ATTEMPTS):
        name = f"{request.group_id}/{index}/{attempt}"
        try:
            made = await _play(name, request, index, host, sample, text, max_length, version)
        finally:
            host.forget(name)
        assert made.end is not None
        if made.end.failure is None or made.end.failure.kind != "infra":
            break
    return made


async def _play(
    name: str,
    request: Request,
    index: int,
    host: EpisodeHost,
    sample: Sample,
    text: Callable[[np.ndarray], str],
    max_length: int,
    version: int,
) -> Completion:
    prompt = np.asarray(request.prompt.token_ids, dtype=np.int64)
    seed = request.sampling.seed + index
    sequences: list[np.ndarray] = []
    made: list[RawCompletion] = []
    turns: list[Turn] = []
    # An environment that ends its process must not take others with it twice.
    alone = not name.endswith("/0")
    answer = await host.begin(name, request.prompt, request.sampling.seed, alone)
    while isinstance(answer, NextTurn):
        parent = prompt if answer.parent is None else sequences[answer.parent]
        context = np.concatenate([parent[: answer.kept], answer.inserted_ids])
        number = len(turns)
        spec = replace(
            request.sampling,
            n=1,
            max_tokens=min(request.sampling.max_tokens, max_length - len(context)),
            # The first turn's is that of a completion without an environment.
            seed=derive_seed(seed, "turn", number) if number else seed,
        )
        raw, versions = await sample(f"{name}/{number}", context.tolist(), spec, request.greedy)
        made.append(raw)
        sequences.append(np.concatenate([context, raw.token_ids]))
        shape = TurnShape(answer.parent, answer.kept, len(answer.inserted_ids), len(raw.token_ids))
        turns.append(Turn(shape, answer.inserted_ids, versions, raw.finish_reason))
        answer = await host.step(name, raw.token_ids, raw.finish_reason)
    return _completion(request, index, made, turns, answer, text, version)


def _completion(
    request: Request,
    index: int,
    made: list[RawCompletion],
    turns: list[Turn],
    end: EpisodeEnd,
    text: Callable[[np.ndarray], str],
    version: int,
) -> Completion:
    if end.failure is not None:
        made, turns = [], []
    rewarded = [
        replace(turn, reward=reward) for turn, reward in zip(turns, end.rewards, strict=bool(turns))
    ]
    none = np.zeros(0, dtype=np.int64)
    return Completion(
        id=f"{request.group_id}/{index}",
        prompt_id=request.prompt.id,
        token_ids=np.concatenate([none, *(one.token_ids for one in made)]),
        logprobs=np.concatenate([none.astype(np.float32), *(one.logprobs for one in made)]),
        finish_reason="length" if end.stop_reason in CUT else "stop",
        seed=request.sampling.seed + index,
        weight_versions=(
            min((turn.weight_versions[0] for turn in turns), default=version),
            max((turn.weight_versions[1] for turn in turns), default=version),
        ),
        text=text(made[-1].token_ids) if made else "",
        turns=tuple(rewarded),
        end=end,
    )
