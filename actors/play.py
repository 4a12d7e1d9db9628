"""Playing an episode: the model's turns in one engine, the environment's answers between them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from cohort.actors.engine import RawCompletion
from cohort.actors.records import Completion, EpisodeHost, Request, SamplingSpec, derive_seed
from cohort.actors.spans import joined
from cohort.actors.turns import CUT, EpisodeEnd, NextTurn, Turn, TurnShape

# An episode that was lost with its worker is begun again once, with the same seeds.
ATTEMPTS = 2


class Sample(Protocol):
    """Samples what follows some tokens; also the weight versions that it began and ended with."""

    def __call__(
        self, request_id: str, token_ids: Sequence[int], spec: SamplingSpec, greedy: bool, /
    ) -> Awaitable[tuple[RawCompletion, tuple[int, int]]]: ...


@dataclass(frozen=True)
class Player:
    """Plays one episode of a group.

    Attributes:
        request: The group's.
        index: Of the episode in its group.
        host: Where the environment runs.
        sample: Samples a turn.
        text: Tokens as rewards read them.
        max_length: Tokens of the longest sequence that the engine takes.
        version: Of the weights as the episode begins.
    """

    request: Request
    index: int
    host: EpisodeHost
    sample: Sample
    text: Callable[[np.ndarray], str]
    max_length: int
    version: int

    async def play(self) -> Completion:
        """The episode at its end; of one that failed, what was sampled is left out."""
        for attempt in range(ATTEMPTS):
            name = f"{self._id}/{attempt}"
            # One that came to its own end is forgotten already.
            forget = True
            try:
                made, turns, end = await self._turns(name, alone=attempt > 0)
                forget = end.failure is not None
            finally:
                if forget:
                    self.host.forget(name)
            if end.failure is None or end.failure.kind != "infra":
                break
        return self._completion(made, turns, end)

    async def _turns(
        self, name: str, alone: bool
    ) -> tuple[list[RawCompletion], list[Turn], EpisodeEnd]:
        """Turn by turn to the end. alone: an environment that ends its process must not take
        others with it twice."""
        sampling, prompt = self.request.sampling, self.request.prompt
        start = np.asarray(prompt.token_ids, dtype=np.int64)
        sequences: list[np.ndarray] = []
        made: list[RawCompletion] = []
        turns: list[Turn] = []
        answer = await self.host.begin(name, prompt, sampling.seed, alone)
        while isinstance(answer, NextTurn):
            parent = start if answer.parent is None else sequences[answer.parent]
            context = np.concatenate([parent[: answer.kept], answer.inserted_ids])
            number = len(turns)
            spec = replace(
                sampling,
                n=1,
                max_tokens=min(
                    answer.max_tokens or sampling.max_tokens,
                    sampling.max_tokens,
                    self.max_length - len(context),
                ),
                stop=answer.stop,
                # The first turn's is that of a completion without an environment.
                seed=derive_seed(self._seed, "turn", number) if number else self._seed,
            )
            raw, versions = await self.sample(
                f"{name}/{number}", context.tolist(), spec, self.request.greedy
            )
            made.append(raw)
            sequences.append(np.concatenate([context, raw.token_ids]))
            inserted, sampled = len(answer.inserted_ids), len(raw.token_ids)
            shape = TurnShape(answer.parent, answer.kept, inserted, sampled)
            turns.append(Turn(shape, answer.inserted_ids, versions, raw.finish_reason))
            answer = await self.host.step(name, raw.token_ids, raw.finish_reason, raw.logprobs)
        return made, turns, answer

    @property
    def _id(self) -> str:
        return f"{self.request.group_id}/{self.index}"

    @property
    def _seed(self) -> int:
        return self.request.sampling.seed + self.index

    def _completion(
        self, made: list[RawCompletion], turns: list[Turn], end: EpisodeEnd
    ) -> Completion:
        if end.failure is not None:
            made, turns = [], []
        rewarded = [
            replace(turn, reward=reward)
            for turn, reward in zip(turns, end.rewards, strict=bool(turns))
        ]
        none = np.zeros(0, dtype=np.int64)
        return Completion(
            id=self._id,
            prompt_id=self.request.prompt.id,
            token_ids=np.concatenate([none, *(one.token_ids for one in made)]),
            logprobs=np.concatenate([none.astype(np.float32), *(one.logprobs for one in made)]),
            finish_reason="length" if end.stop_reason in CUT else "stop",
            seed=self._seed,
            weight_versions=(
                min((turn.weight_versions[0] for turn in turns), default=self.version),
                max((turn.weight_versions[1] for turn in turns), default=self.version),
            ),
            text=self.text(made[-1].token_ids) if made else "",
            turns=tuple(rewarded),
            end=end,
            spans=joined(one.spans for one in made),
        )
