"""The records that every package shares: prompts -> completions -> groups -> scored groups.

Each record has an id; joins are by id, never by position. Token ids are the truth;
text exists only for rewards and for people to read.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, TypeAlias

import numpy as np

from cohort.actors.plain import JsonObject
from cohort.actors.spans import Span
from cohort.actors.text import prefill_of
from cohort.actors.turns import (
    EpisodeEnd,
    EpisodeMeta,
    FailureKind,
    FinishReason,
    NextTurn,
    Turn,
    TurnShape,
)
from cohort.actors.watch import Look

if TYPE_CHECKING:
    from ray import ObjectRef

Messages = list[dict[str, str]]
# The version of an engine that has not pulled published weights yet; these begin with 0.
UNSYNCED = -1


@dataclass(frozen=True)
class Prompt:
    """One question, as an engine gets it.

    Attributes:
        id: Of its row and epoch, unique in a run.
        token_ids: What the engine continues.
        content: The messages or the text that the tokens were made of.
        columns: Every other column of its row; reward functions receive them by name.
        epoch: Counted from 0.
        text: The prompt as the model reads it, chat template rendered; None when it was not kept.
        source: The part of a mixture, the level, the dataset that it is of.

    Example:
        >>> prompt = Prompt("0-sum", (1, 2, 3), "What is 1 + 1?", {"answer": 2})
        >>> prompt.row_id, prompt.columns["answer"]
        ('sum', 2)
    """

    id: str
    token_ids: tuple[int, ...]
    content: Messages | str
    columns: JsonObject = field(default_factory=dict)
    epoch: int = 0
    text: str | None = field(default=None, compare=False)
    source: str | None = None

    @property
    def row_id(self) -> str:
        """The id of its row, the same in every epoch."""
        return self.id.removeprefix(f"{self.epoch}-")

    @property
    def prefill(self) -> str:
        """What the answer begins with before the model's own words, see `prefill_of`."""
        return prefill_of(self.content, self.text)


@dataclass(frozen=True)
class Completion:
    """One sampled answer, or all replies of one episode.

    Attributes:
        token_ids: [T] int64, what the engine sampled, including sampled end-of-sequence tokens.
        logprobs: [T] float32, behaviour log-probs of those tokens, nats, after temperature.
        weight_versions: The first and the last weight version that produced a token.
        turns: Of an episode, in order; the sampled tokens of the turns, one after another, are
            token_ids. Empty: one turn that continues the prompt.
        end: How an episode ended; None where there was no environment.
        spans: (version, tokens), in order: which weights every token came from. Empty where it did
            not come from an engine.
    """

    id: str
    prompt_id: str
    token_ids: np.ndarray
    logprobs: np.ndarray
    finish_reason: FinishReason
    seed: int
    weight_versions: tuple[int, int]
    text: str
    turns: tuple[Turn, ...] = ()
    end: EpisodeEnd | None = None
    spans: tuple[Span, ...] = ()

    def __post_init__(self) -> None:
        if len(self.token_ids) != len(self.logprobs):
            raise ValueError(
                f"completion {self.id}: {len(self.token_ids)} token ids, "
                f"{len(self.logprobs)} log-probs"
            )
        if self.spans and sum(count for _, count in self.spans) != len(self.token_ids):
            raise ValueError(
                f"completion {self.id}: {len(self.token_ids)} token ids, spans {self.spans}"
            )
        sampled = sum(turn.shape.sampled for turn in self.turns)
        if self.turns and sampled != len(self.token_ids):
            raise ValueError(
                f"completion {self.id}: {len(self.token_ids)} token ids, {sampled} in its turns"
            )


@dataclass(frozen=True)
class Group:
    """G completions of one prompt, from one engine.

    Example:
        What a program of your own sees of a group that was scored (see `cohort.launch`):

            import ray

            for scored in await c.score(await c.generate(c.prompts(0))):
                assert isinstance(scored.ref, ray.ObjectRef)  # in Ray's object store
                group = (await scored.ref).group
                print(group.prompt.text, [completion.text for completion in group.completions])
    """

    id: str
    prompt: Prompt
    completions: tuple[Completion, ...]


@dataclass(frozen=True)
class RewardError:
    """Why one reward function gave no value for one completion."""

    function: str
    completion_id: str
    cause: Literal["raised", "timeout", "wrong_length", "wrong_type", "died"]
    message: str


@dataclass(frozen=True)
class ScoredGroup:
    """A group with its rewards.

    Attributes:
        by_function: Name -> G values; None where the function does not apply or failed.
        totals: G weighted sums; None where no function gave a value, or one failed.
        latency_s: Seconds that scoring the group took.
        parts: "function/part" -> G numbers that the function returned besides its value.
        extra: "function/name" -> G entries for people (texts, numbers, None).
        sample_s: G entries, seconds that the calls which scored the completion took.
    """

    group: Group
    by_function: dict[str, tuple[float | None, ...]]
    totals: tuple[float | None, ...]
    errors: tuple[RewardError, ...] = ()
    latency_s: float = 0.0
    parts: dict[str, tuple[float | None, ...]] = field(default_factory=dict)
    extra: dict[str, tuple[object, ...]] = field(default_factory=dict)
    sample_s: tuple[float, ...] = ()


@dataclass(frozen=True)
class GroupMeta:
    """What the driver knows of a group: sizes and versions. The tokens stay in the object store.

    Attributes:
        completion_tokens: Of each completion, as are `completion_ids` and `truncated`.
        weight_versions: The first and the last of all its tokens.
        seconds: That the actor took.
        turns, episodes: Of each completion; empty where there is no environment: each completion is
            one turn that continues the prompt.
    """

    group_id: str
    prompt_tokens: int
    completion_ids: tuple[str, ...]
    completion_tokens: tuple[int, ...]
    truncated: tuple[bool, ...]
    weight_versions: tuple[int, int]
    actor: str
    seconds: float
    turns: tuple[tuple[TurnShape, ...], ...] = ()
    episodes: tuple[EpisodeMeta, ...] = ()

    @classmethod
    def of(cls, group: Group, actor: str, seconds: float) -> GroupMeta:
        """What there is to know of a group that this actor generated in so many seconds."""
        made = group.completions
        versions = [completion.weight_versions for completion in made]
        return cls(
            group_id=group.id,
            prompt_tokens=len(group.prompt.token_ids),
            completion_ids=tuple(completion.id for completion in made),
            completion_tokens=tuple(len(completion.token_ids) for completion in made),
            truncated=tuple(completion.finish_reason == "length" for completion in made),
            weight_versions=(
                min(first for first, _ in versions),
                max(last for _, last in versions),
            ),
            actor=actor,
            seconds=seconds,
            turns=tuple(
                tuple(turn.shape for turn in one.turns) for one in made if one.end is not None
            ),
            episodes=tuple(one.end.meta for one in made if one.end is not None),
        )


@dataclass(frozen=True)
class ScoreMeta:
    """What the driver knows of a group's rewards.

    Attributes:
        totals, by_function, parts, sample_s: As in ScoredGroup.
        seconds: That scoring the group took.
        metrics: "function/name" -> what the function logged.
        turn_rewards: Of each completion, what the environment gave for each of its turns; empty
            where there is no environment.
    """

    group_id: str
    totals: tuple[float | None, ...]
    by_function: dict[str, tuple[float | None, ...]]
    errors: tuple[RewardError, ...]
    seconds: float
    parts: dict[str, tuple[float | None, ...]] = field(default_factory=dict)
    metrics: dict[str, tuple[float, ...]] = field(default_factory=dict)
    sample_s: tuple[float, ...] = ()
    turn_rewards: tuple[tuple[float, ...], ...] = ()


# A scored group in Ray's object store, or the group itself.
GroupRef: TypeAlias = "ObjectRef[ScoredGroup] | ScoredGroup"


@dataclass(frozen=True)
class ScoredRef:
    """A scored group as the driver holds it: sizes, rewards, and where the tokens are.

    Attributes:
        ref: A Ray object reference to the ScoredGroup (or the ScoredGroup itself).
    """

    meta: GroupMeta
    scores: ScoreMeta
    ref: GroupRef


@dataclass(frozen=True)
class Failure:
    """An error as a value at a process boundary.

    Attributes:
        kind: "infra": the process or machine failed, the work may succeed elsewhere. "data": this
            input fails wherever it runs. "bug": the program is wrong.
        what: What was being done, in words.
        message: The error; for a bug, with its traceback.
    """

    kind: FailureKind
    what: str
    message: str

    def __str__(self) -> str:
        return f"{self.what}: {self.message}"


@dataclass(frozen=True)
class NotSynced(Failure):
    """The actor has no weights to generate with now. It lives: a reason to wait, not a death."""


@dataclass(frozen=True)
class Place:
    """Where an actor runs (its node, the cores it may use, its process), and how far it is.

    Attributes:
        progress: A number that changes with every token of its engine and every stage of an update;
            while there is work, one that stands still means that the actor hangs.
        working: Whether its engine has something to do right now.
        look: At the engine's processes; None: they cannot be seen.
    """

    node_id: str
    cores: tuple[int, ...]
    pid: int
    progress: int = 0
    working: bool = True
    look: Look | None = None


@dataclass(frozen=True)
class SamplingSpec:
    """Every sampling field that matters, stated: nothing comes from a model's own defaults.

    Attributes:
        stop: Texts that end a completion and are a part of it, besides the model's own end.
    """

    max_tokens: int
    temperature: float
    n: int
    seed: int
    stop: tuple[str, ...] = ()


class EpisodeHost(Protocol):
    """A worker that runs environments, as an actor calls it. Its failures are values."""

    async def begin(
        self, episode_id: str, prompt: Prompt, seed: int, alone: bool
    ) -> NextTurn | EpisodeEnd:
        """Make an environment and reset it.

        Args:
            seed: The same for all episodes of a group.
            alone: In a process of its own, because one that it shared was lost.
        """
        ...

    async def step(
        self,
        episode_id: str,
        token_ids: np.ndarray,
        finish_reason: FinishReason,
        logprobs: np.ndarray,
    ) -> NextTurn | EpisodeEnd:
        """Give the environment the model's reply. An episode that ended is forgotten.

        Args:
            logprobs: Of its tokens, nats, for an agent that asks for them.
        """
        ...

    def forget(self, episode_id: str) -> None:
        """End an episode that is no longer waited for; what it started is killed."""
        ...


@dataclass(frozen=True)
class Request:
    """One group to generate.

    Attributes:
        greedy: For evaluation, temperature 0 and no seed.
        step: That it is for; groups of older steps go first where they have to wait.
        oldest: The oldest weights that it may be begun with (see `actors/admission.py`).
        host: Where the environment of its episodes runs; None: there is none.
    """

    group_id: str
    prompt: Prompt
    sampling: SamplingSpec
    greedy: bool = False
    step: int = 0
    oldest: int = 0
    host: EpisodeHost | None = None


@dataclass(frozen=True)
class WeightsInfo:
    """One published version of the weights: what it holds and where to pull it.

    Attributes:
        names: In file order.
        fingerprint: xxh3-128 over the file's bytes.
        path: A safetensors file on node `node_id`.
        remote: Object reference to the same bytes, for engines on other nodes.
    """

    version: int
    names: tuple[str, ...]
    fingerprint: str
    nbytes: int
    path: str
    node_id: str
    remote: ObjectRef[np.ndarray] | None = None


def derive_seed(run_seed: int, *parts: int | str) -> int:
    """A 48-bit seed from the run seed and the names of what it seeds.

    Stable over processes, machines and restarts (unlike `hash`), and independent of which engine
    does the work. Sample i of a group uses `derive_seed(...) + i`, as vLLM numbers the samples of
    one request; 48 bits leave room for that without overflow.
    """
    text = "/".join(str(part) for part in (run_seed, *parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "big")
