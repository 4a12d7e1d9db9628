"""Turns and episodes: what a rollout actor and an environment say to each other.

An episode is a list of turns. The actor samples one turn at a time, hands the sampled tokens to the
environment's worker, and gets back what the next turn continues, or the end. It sees token ids
alone; messages, tools and templates are the worker's business (`cohort.rewards.environments`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from cohort.actors.plain import JsonObject

# The name under which what an environment gave is listed beside the reward functions.
ENVIRONMENT = "environment"
FinishReason = Literal["stop", "length"]
FailureKind = Literal["infra", "data", "bug"]
# done: the environment, or the agent, ended it. answered: a reply without a tool call. turns,
# tool_calls, time: a limit of the config. length: a reply was longer than actors.max_tokens.
# context: the next turn has no room in model.max_length. failed: see `EpisodeEnd.failure`.
StopReason = Literal[
    "done", "answered", "turns", "tool_calls", "time", "length", "context", "failed"
]
Stage = Literal["start", "reset", "step", "template"]
# Ended for want of tokens: what `algorithm.mask_truncated` leaves out.
CUT: tuple[StopReason, ...] = ("length", "context")


@dataclass(frozen=True)
class EpisodeFailure:
    """Why an episode has no reward.

    Attributes:
        kind: As in `Failure`; "infra" may work elsewhere.
        stage: What the environment was doing.
        message: The error, for people.
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
        max_tokens: A bound of its own on the reply, below `actors.max_tokens`; None: none.
        stop: Texts that end the reply; they are a part of it.
    """

    parent: int | None
    kept: int
    inserted_ids: np.ndarray
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()


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
    messages: tuple[JsonObject, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    state: JsonObject = field(default_factory=dict)
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


@dataclass(frozen=True)
class TurnShape:
    """Sizes of one turn of an episode, and which tokens it continues.

    Attributes:
        parent: The earlier turn of the episode whose sequence it continues; None: the prompt.
        kept: Leading tokens of that sequence, the prompt counted, which it continues. All of them
            where the turn extends its parent; fewer where the history was rewritten (a fork).
        inserted: Tokens between those and the sampled ones: messages of the environment and the
            template's boundary tokens. They have no loss and no log-probs.
        sampled: Tokens that the model sampled.

    Example:
        A prompt of 10 tokens, a reply of 5, a tool's answer of 7, a reply of 3:

        >>> first, second = TurnShape(None, 10, 0, 5), TurnShape(0, 15, 7, 3)
        >>> second.end
        25
    """

    parent: int | None
    kept: int
    inserted: int
    sampled: int

    @property
    def end(self) -> int:
        """Tokens of the turn's whole sequence: from the prompt to its last sampled token."""
        return self.kept + self.inserted + self.sampled


@dataclass(frozen=True)
class Turn:
    """One reply of the model in an episode; its sampled tokens are in the completion.

    Attributes:
        shape: Sizes, and which tokens it continues.
        inserted_ids: [I] int64, the inserted tokens.
        weight_versions: The first and the last weight version that produced a token of it.
        finish_reason: Why the engine ended it.
        reward: What the environment gave for it; None: nothing.
    """

    shape: TurnShape
    inserted_ids: np.ndarray
    weight_versions: tuple[int, int]
    finish_reason: FinishReason
    reward: float | None = None
