"""What a learner rank is built from, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from cohort.learner.config import AlgorithmConfig, Dtype, LearnerConfig
from cohort.learner.grpo import LossStats
from cohort.learner.lora_config import LoraConfig
from cohort.learner.shapes import LENGTH_MULTIPLE


@dataclass(frozen=True)
class LearnerSpec:
    """Everything a rank is built from.

    Attributes:
        model_path: A Hugging Face folder, or a hub id.
        init_from: A folder with other weights of this architecture to start from, or under `lora`
            with an adapter of model_path; the reference stays that of model_path.
        lora: The adapters to train; None trains all weights.
        temperature: Of the rollouts.
        max_tokens: The longest completion of the rollouts.
        threads: CPU threads of the rank.
        cores: Of all ranks, if they are bound to some; empty: they may use any.
        shm_dir: Where rank 0 publishes weights and all keep copies of their state; see `home`.
        log_dir: Where the rank's output goes; None leaves it with Ray's.
        total_steps: Of the whole run, where the learning rate's schedule ends.
        trial_dir: Where driver and ranks try to save before anything is trained; None: nothing
            will be saved.
    """

    model_path: str
    dtype: Dtype
    learner: LearnerConfig
    algorithm: AlgorithmConfig
    temperature: float
    max_tokens: int
    rank: int
    world_size: int
    device: Literal["cpu", "cuda"]
    threads: int
    seed: int
    shm_dir: str
    log_dir: str | None = None
    total_steps: int = 1
    trial_dir: str | None = None
    init_from: str | None = None
    cores: tuple[int, ...] = ()
    lora: LoraConfig | None = None


@dataclass(frozen=True)
class ModelFacts:
    """What the driver needs to know of the model.

    Attributes:
        parameters: Their number.
        attention_work: Work of one token's attention to one other token over all layers, relative
            to one token's matrix products.
        masked_attention: Rows are padded, and all pairs of a row computed, not only those that
            attend to each other.
        shares_prompts: Whether a prompt can be computed once for several completions.
        length_multiple: What the tokens of a micro-batch, or of a row when masked, are padded to.
    """

    parameters: int
    attention_work: float
    masked_attention: bool
    shares_prompts: bool
    length_multiple: int = LENGTH_MULTIPLE


@dataclass(frozen=True)
class UpdateResult:
    """What one rank saw of one optimizer update.

    Attributes:
        stats: Sums over this rank's tokens.
        applied: Whether the weights have changed; the same on all ranks.
        grad_norm: Global, before clipping.
        learning_rate: Of this update.
        loss_scale: The factor on a float16 loss that was used last, 1 in other precisions.
    """

    stats: LossStats
    applied: bool
    grad_norm: float
    learning_rate: float
    loss_scale: float = 1.0


@dataclass(frozen=True)
class RankResult:
    """What one rank saw of one step.

    Attributes:
        updates: One for each optimizer update.
        steps_done: Steps so far with an update that was applied.
        seconds: That the step took on this rank.
        lost: Indices of groups in the call whose objects are gone. If any rank has some, none has
            done anything.
    """

    rank: int
    updates: tuple[UpdateResult, ...]
    steps_done: int
    seconds: float
    lost: tuple[int, ...] = ()
