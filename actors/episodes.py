"""Episodes: what a rollout actor and an environment say to each other between the model's turns.

An episode is a list of turns. The actor samples one turn at a time, hands the sampled tokens to the
environment's worker, and gets back what the next turn continues, or the end. It sees token ids
alone; messages, tools and templates are the worker's business (`cohort.rewards.environments`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from cohort.actors.records import FailureKind, FinishReason, Prompt

# done: the environment ended it. answered: a reply without a tool call. turns, tool_calls, time:
# a limit of the config. length: a reply was longer than actors.max_tokens. context: the next turn
# has no room in model.max_length. failed: see `EpisodeEnd.failure`.
StopReason = Literal[
    "done", "answered", "turns", "tool_calls", "time", "length", "context", "failed"
]
Stage = Literal["start", "reset", "step", "template"]
# Ended for want of tokens: what `algorithm.mask_truncated` leaves out.
CUT: tuple[StopReason, ...] = ("length", "context")


@dataclass(frozen=True)
class EpisodeFailure:
    """Why an episode has no reward. kind: as in `Failure`; "infra" may work elsewhere.

    stage: what the environment was doing.
    """

    kind: FailureKind
    stage: Stage
    message: str


@dataclass(frozen=True)
class NextTurn:
    """What the next turn continues.

    Attributes:
        parent: The turn whose sequence it continues; None: the prompt.
        kept: Leading tokens of that sequence, the prompt counted, that it continues.
        inserted_ids: [I] int64, the tokens behind those: the environment's messages and the
            template's boundary tokens.
    """

    parent: int | None
    kept: int
    inserted_ids: np.ndarray


@dataclass(frozen=True)
class EpisodeEnd:
    """The end of an episode.

    Attributes:
        stop_reason: Why it ended.
        rewards: For each turn what the environment gave for it; None: nothing.
        messages: All messages behind the prompt, replies and the environment's.
        metrics: Numbers of the episode by name: the environment's own, and tool_calls, tool_errors.
        state: Public attributes of the environment at the end, for reward functions.
        failure: Why the episode is not trained; None: it is.
    """

    stop_reason: StopReason
    rewards: tuple[float | None, ...] = ()
    messages: tuple[dict[str, Any], ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    failure: EpisodeFailure | None = None

    @property
    def reward(self) -> float | None:
        """The sum of what the environment gave; None where it gave nothing."""
        given = [reward for reward in self.rewards if reward is not None]
        return sum(given) if given else None

    @property
    def meta(self) -> EpisodeMeta:
        """What the driver gets to know."""
        return EpisodeMeta(self.stop_reason, len(self.rewards), self.metrics, self.failure)


@dataclass(frozen=True)
class EpisodeMeta:
    """What the driver knows of an episode. Attributes as of `EpisodeEnd`."""

    stop_reason: StopReason
    turns: int
    metrics: dict[str, float]
    failure: EpisodeFailure | None = None


class EpisodeHost(Protocol):
    """A worker that runs environments, as an actor calls it. Its failures are values."""

    async def begin(self, episode_id: str, prompt: Prompt, seed: int) -> NextTurn | EpisodeEnd:
        """Make an environment and reset it. seed: the same for all episodes of a group."""
        ...

    async def step(
        self, episode_id: str, token_ids: np.ndarray, finish_reason: FinishReason
    ) -> NextTurn | EpisodeEnd:
        """Give the environment the model's reply. An episode that ended is forgotten."""
        ...

    def forget(self, episode_id: str) -> None:
        """End an episode that nobody waits for; what it started is killed."""
        ...
