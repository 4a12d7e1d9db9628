"""The `learner` and `algorithm` sections of the config."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from cohort.actors.plain import JsonObject
from cohort.learner.presets import PRESETS, Preset

Beta = Annotated[float, Field(ge=0, lt=1)]
Dtype = Literal["bfloat16", "float16", "float32"]


class LearnerConfig(BaseModel):
    """The DeepSpeed learner: ranks, memory, optimizer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    workers: int = Field(1, ge=1, description="Learner ranks, one Ray actor each.")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        1, description="DeepSpeed ZeRO stage. From 1 on, gradients add up in float32."
    )
    learning_rate: float = Field(1e-6, gt=0, description="Peak learning rate of AdamW.")
    warmup_steps: int = Field(
        0, ge=0, description="Updates of linear warm-up; the first update is above 0."
    )
    lr_schedule: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="The learning rate after warm-up, until the last update of the run."
    )
    lr_final: float = Field(
        0.1,
        gt=0,
        le=1,
        description="Fraction of the peak at the last update; for lr_schedule=linear and cosine.",
    )
    adam_betas: tuple[Beta, Beta] = Field((0.9, 0.99), description="Betas of AdamW.")
    adam_eps: float = Field(1e-8, gt=0, description="Epsilon of AdamW.")
    weight_decay: float = Field(0.0, ge=0, description="Decoupled weight decay of AdamW.")
    gradient_clip: float = Field(1.0, gt=0, description="Largest global gradient norm.")
    micro_batch_tokens: int = Field(
        8192, ge=16, description="Tokens of one forward and backward, padding included."
    )
    logit_chunk_tokens: int = Field(
        1024, ge=1, description="Completion tokens whose logits exist at one time."
    )
    gradient_checkpointing: bool = Field(
        False,
        description="Recompute activations in the backward pass: less memory, a third slower.",
    )
    offload: Literal["none", "optimizer", "all"] = Field(
        "none",
        description="GPUs only: keep optimizer state (ZeRO 1-3), or parameters too (ZeRO 3), in "
        "main memory.",
    )
    deepspeed: JsonObject = Field(
        default_factory=dict,
        description="Merged into DeepSpeed's configuration, as {zero_optimization: "
        "{reduce_bucket_size: 1e8}}; what Cohort itself decides is refused.",
    )
    float8: Literal["off", "tensorwise", "rowwise"] = Field(
        "off",
        description="Matrix products of the linear layers in float8 (torchao), one scale for each "
        "tensor or each row. On CPUs it is emulated, for trying out.",
    )
    attention: Literal["auto", "tree", "flash", "flex", "sdpa", "eager"] = Field(
        "auto",
        description="auto: what skips the hidden parts of a shared-prompt row: tree on CPUs; flash "
        "(torch's flash kernels, 16 bits) on GPUs, flex (GPUs only: torch's flex_attention) where "
        "that fails or a window hides something; sdpa, with a mask of L x L, where both fail.",
    )
    compile: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Compile decoder layers and token scores (torch.compile), once for all "
        "lengths. auto: on GPUs, where ZeRO does not cut parameters up (zero_stage below 3).",
    )
    max_skipped_steps: int = Field(
        3, ge=1, description="Non-finite steps in a row after which the run stops."
    )
    step_timeout_s: float = Field(
        1800, gt=0, description="Longest wait for one optimizer step or checkpoint."
    )
    keep_copy: bool = Field(
        True,
        description="Keep two copies of the state in shared memory: a rank's death costs one step.",
    )

    def contradictions(self) -> list[str]:
        """Settings that contradict each other, one line each, with the keys to change."""
        problems = []
        if self.offload != "none" and self.zero_stage < OFFLOAD_STAGE[self.offload]:
            problems.append(
                f"learner.offload={self.offload} needs learner.zero_stage="
                f"{OFFLOAD_STAGE[self.offload]} or more (it is {self.zero_stage})"
            )
        for key, value in self.deepspeed.items():
            if key not in DEEPSPEED_KEYS:
                problems.append(
                    f"learner.deepspeed.{key}: decided by Cohort, or unknown; what can be set: "
                    + ", ".join(DEEPSPEED_KEYS)
                )
            elif key == "zero_optimization" and "stage" in value:
                problems.append("learner.deepspeed.zero_optimization.stage: use learner.zero_stage")
        if self.compile == "on" and self.zero_stage == 3:
            problems.append(
                "learner.compile=on needs whole parameters: set learner.zero_stage to 2 or less, "
                "or learner.compile to auto"
            )
        usual = type(self).model_fields["lr_final"].default
        if self.lr_schedule == "constant" and self.lr_final != usual:
            problems.append(
                f"learner.lr_final={self.lr_final:g} is not used with learner.lr_schedule=constant:"
                f" set it to {usual:g}, or learner.lr_schedule to linear or cosine"
            )
        return problems

    def compiles(self, device: str) -> bool:
        """Whether decoder layers and token scores are compiled on this kind of device."""
        return self.compile == "on" or (
            self.compile == "auto" and device == "cuda" and self.zero_stage < 3
        )


OFFLOAD_STAGE = {"optimizer": 1, "all": 3}
# The parts of DeepSpeed's configuration that do not change what a step computes. The rest
# (precision, clipping, accumulation, optimizer) follows from keys of our own.
DEEPSPEED_KEYS = (
    "zero_optimization",
    "aio",
    "comms_logger",
    "flops_profiler",
    "memory_breakdown",
    "wall_clock_breakdown",
)


Baseline = Literal["mean", "leave_one_out", "none"]
Scale = Literal["group", "batch", "none"]
Aggregation = Literal["token", "sequence", "prompt", "constant"]
KLEstimator = Literal["k1", "k2", "k3"]


class AlgorithmConfig(BaseModel):
    """The policy-gradient update. A preset sets these keys; each can be set by itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    preset: Preset = Field("cohort", description="A named set of the keys below.")
    baseline: Baseline = Field(
        "mean",
        description="Subtracted from the rewards: the group's mean, that of the others, nothing.",
    )
    scale: Scale = Field(
        "group",
        description="Rewards are divided by the standard deviation (ddof 0) of the group, or of "
        "all rewards that the step trains, or by nothing.",
    )
    credit: Literal["episode", "turn"] = Field(
        "episode",
        description="Of an episode with an environment: one advantage from its total reward, or "
        "one for each turn: the turns' rewards are normalised together, and a turn counts those "
        "from it on (reward functions, length penalty and KL count to the last). Each turn reward "
        "then stands where baseline, scale and drop_zero_variance say reward.",
    )
    drop_zero_variance: bool = Field(
        True,
        description="Leave out groups whose task rewards are all equal: the weighted totals of "
        "rewards.functions, before length penalty and KL.",
    )
    overlong_buffer: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Soft length penalty: over this last fraction of actors.max_tokens the reward "
        "falls by up to 1. It never makes a group worth training. 0: none.",
    )
    mask_truncated: bool = Field(
        False, description="Do not train completions that were truncated at actors.max_tokens."
    )
    dynamic_sampling_rounds: int = Field(
        0,
        ge=0,
        description="How often a step may sample new prompts in place of groups that "
        "drop_zero_variance leaves out.",
    )
    objective: Literal["clip", "cispo", "dppo_tv", "cross_entropy"] = Field(
        "clip",
        description="clip: PPO's; cispo: every token, its weight capped at 1 + clip_high; dppo_tv: "
        "tokens whose probability moved by more than clip_low / clip_high give nothing. "
        "cross_entropy: demonstrations; `cohort warmup` sets it.",
    )
    ratio: Literal["token", "sequence"] = Field(
        "token", description="Ratio of each token, or the geometric mean over its completion."
    )
    anchor: Literal["learner", "engine"] = Field(
        "learner",
        description="The ratio is against the learner's log-probs at the start of the step, or "
        "against those the engine sampled with.",
    )
    clip_low: float = Field(
        0.2, gt=0, description="Ratios are clipped below at 1 - clip_low; not for objective=cispo."
    )
    clip_high: float = Field(0.28, gt=0, description="Ratios are clipped above at 1 + clip_high.")
    dual_clip: float | None = Field(
        3.0,
        gt=1,
        description="Bound of the ratio for negative advantages, for objective=clip. Empty: none.",
    )
    aggregation: Aggregation = Field(
        "token",
        description="token: mean over all tokens that the update trains; sequence: mean over "
        "completions of their token means; prompt: mean over prompts of their token means; "
        "constant: token sum / (completions * max_tokens), counting all completions with a "
        "reward, trained or not.",
    )
    correction: Literal["truncate", "mask", "off"] = Field(
        "truncate",
        description="Weight w = learner / engine probability of each token: min(w, cap), or 0 "
        "outside [low, cap]. Only for anchor=learner (an engine ratio holds w already) and "
        "ratio=token.",
    )
    correction_cap: float = Field(
        2.0, ge=1, description="Largest weight of a token, for correction=truncate and mask."
    )
    correction_low: float = Field(0.5, ge=0, le=1, description="Smallest, for correction=mask.")
    sequence_mask: tuple[float, float] | None = Field(
        None,
        description="Leave out completions whose geometric mean of w is outside, as [0.99, 1.01].",
    )
    negative_mask: float | None = Field(
        None,
        gt=0,
        description="Leave out completions with a negative advantage that the policy has left by "
        "more than this many nats a token, as 0.5.",
    )
    kl_coef: float = Field(
        0.0, ge=0, description="Weight of the KL to the reference. 0: no reference is loaded."
    )
    kl_estimator: KLEstimator = Field(
        "k3", description="In the loss: k3, weighted by the ratio, or k2. In the reward: k1."
    )
    kl_in: Literal["loss", "reward"] = Field(
        "loss",
        description="loss: on every token. reward: summed over a completion and subtracted from "
        "its reward, after drop_zero_variance has looked at it.",
    )
    reference_refresh_steps: int = Field(
        0,
        ge=0,
        description="Steps after which the policy becomes the reference. 0: the original model.",
    )
    entropy_coef: float = Field(0.0, ge=0, description="Weight of the entropy bonus.")
    updates_per_step: int = Field(
        1, ge=1, description="Optimizer updates made from the completions of one step."
    )
    update_on: Literal["all", "share"] = Field(
        "all", description="Each update sees all groups of the step, or its own share of them."
    )

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, given: object) -> object:
        preset = given.get("preset", "cohort") if isinstance(given, dict) else None
        # A preset of a wrong type or name is left for the field's own check to report.
        if not isinstance(given, dict) or not isinstance(preset, str) or preset not in PRESETS:
            return given
        values = {**PRESETS[preset], **given}
        if values.get("objective", "clip") != "clip":
            # Other objectives have none. The preset's is dropped; one in the config is refused.
            values["dual_clip"] = given.get("dual_clip")
        return values

    @property
    def judges_completions(self) -> bool:
        """Whether the loss of a token depends on all tokens of its completion."""
        masks = (self.sequence_mask, self.negative_mask)
        return self.ratio == "sequence" or any(mask is not None for mask in masks)

    def refreshes_reference(self, steps_done: int) -> bool:
        """Whether the policy becomes the reference after this step."""
        every = self.reference_refresh_steps
        return self.kl_coef > 0 and every > 0 and steps_done % every == 0

    def contradictions(self) -> list[str]:
        """Settings that contradict each other, one line each, with the keys to change."""
        if self.objective == "cross_entropy":
            return [
                f"algorithm.{key}={getattr(self, key)} does not apply to "
                f"algorithm.objective=cross_entropy: set it to {needed}"
                for key, needed in CROSS_ENTROPY_NEEDS.items()
                if getattr(self, key) != needed
            ]
        problems = self._unused()
        if self.anchor == "engine" and self.correction != "off":
            problems.append(
                f"algorithm.correction={self.correction} with algorithm.anchor=engine would apply "
                "the same ratio twice: set algorithm.correction=off or algorithm.anchor=learner"
            )
        elif self.ratio == "sequence" and self.correction != "off":
            problems.append(
                f"algorithm.correction={self.correction} weighs tokens, algorithm.ratio=sequence "
                "whole completions: set algorithm.correction=off. algorithm.anchor=engine holds "
                "the engine's mismatch in the ratio, algorithm.sequence_mask leaves out the "
                "completions where it is large"
            )
        if self.kl_in == "loss" and self.kl_estimator == "k1":
            problems.append(
                "algorithm.kl_estimator=k1 in the loss has an expected gradient of zero: use k3 or "
                "k2, or algorithm.kl_in=reward"
            )
        if self.kl_in == "reward" and self.kl_estimator != "k1":
            problems.append(
                f"algorithm.kl_estimator={self.kl_estimator} in the reward has a wrong gradient: "
                "use k1, or algorithm.kl_in=loss"
            )
        if self.objective != "clip" and self.ratio == "sequence":
            problems.append(
                f"algorithm.objective={self.objective} is defined on tokens: set "
                "algorithm.ratio=token"
            )
        if self.credit == "turn" and self.ratio == "sequence":
            problems.append(
                "algorithm.credit=turn gives every turn its own advantage, algorithm.ratio="
                "sequence all tokens one ratio, whose gradient would mix them again: set "
                "algorithm.ratio=token or algorithm.credit=episode"
            )
        if self.dynamic_sampling_rounds and not self.drop_zero_variance:
            problems.append(
                "algorithm.dynamic_sampling_rounds replaces groups that are dropped: set "
                "algorithm.drop_zero_variance=true"
            )
        if (
            self.sequence_mask is not None
            and not 0 <= self.sequence_mask[0] < self.sequence_mask[1]
        ):
            problems.append(
                f"algorithm.sequence_mask={list(self.sequence_mask)} must be [low, high]"
            )
        return problems

    def _unused(self) -> list[str]:
        """Keys that were changed although the others leave them without any effect: those whose
        value is neither the preset's nor the default, so that a config written out in full, every
        key present, can be read again."""
        usual = {name: field.default for name, field in type(self).model_fields.items()}
        usual |= PRESETS[self.preset]
        if self.objective != "clip":
            usual["dual_clip"] = None
        return [
            f"algorithm.{key}={getattr(self, key)} is not used: {because}. Leave it out, or set "
            f"it to {'null' if usual[key] is None else usual[key]}"
            for key, (used, because) in USED_WHEN.items()
            if not used(self) and getattr(self, key) != usual[key]
        ]


# The keys that others can leave without effect: whether they are used, and why not. All other keys
# are used by every objective but cross_entropy.
USED_WHEN: dict[str, tuple[Callable[[AlgorithmConfig], bool], str]] = {
    "clip_low": (
        lambda algorithm: algorithm.objective != "cispo",
        "algorithm.objective=cispo bounds its weights above only, at 1 + clip_high",
    ),
    "dual_clip": (
        lambda algorithm: algorithm.objective == "clip",
        "it is a part of algorithm.objective=clip",
    ),
    "correction_cap": (
        lambda algorithm: algorithm.correction != "off",
        "algorithm.correction is off",
    ),
    "correction_low": (
        lambda algorithm: algorithm.correction == "mask",
        "it is the lower bound of algorithm.correction=mask",
    ),
    "kl_estimator": (lambda algorithm: algorithm.kl_coef > 0, "algorithm.kl_coef=0 has no KL"),
    "kl_in": (lambda algorithm: algorithm.kl_coef > 0, "algorithm.kl_coef=0 has no KL"),
    "reference_refresh_steps": (
        lambda algorithm: algorithm.kl_coef > 0,
        "algorithm.kl_coef=0 uses no reference",
    ),
    "update_on": (
        lambda algorithm: algorithm.updates_per_step > 1,
        "algorithm.updates_per_step=1 has one update, on all groups",
    ),
}

# Demonstrations have no rewards, no engine that sampled them, and one update each: the other keys
# do not apply.
CROSS_ENTROPY_NEEDS: dict[str, object] = {
    **{
        name: field.default
        for name, field in AlgorithmConfig.model_fields.items()
        if name not in ("preset", "objective")
    },
    "dual_clip": None,
}
