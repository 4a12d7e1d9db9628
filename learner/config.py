"""The `learner` and `algorithm` sections of the config."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class LearnerConfig(BaseModel):
    """The DeepSpeed learner: ranks, memory, optimizer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    workers: int = Field(1, ge=1, description="Learner ranks, one Ray actor each.")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        1, description="DeepSpeed ZeRO stage. From 1 on, gradients add up in float32."
    )
    learning_rate: float = Field(1e-6, gt=0, description="Peak learning rate of AdamW.")
    warmup_steps: int = Field(
        0, ge=0, description="Steps of linear warm-up; the first step is above 0."
    )
    adam_betas: tuple[float, float] = Field((0.9, 0.99), description="Betas of AdamW.")
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
    attention: Literal["auto", "sdpa", "eager"] = Field(
        "auto", description="Attention implementation; auto picks by device."
    )
    max_skipped_steps: int = Field(
        3, ge=1, description="Non-finite steps in a row after which the run stops."
    )
    step_timeout_s: float = Field(
        1800, gt=0, description="Longest wait for one optimizer step or checkpoint."
    )


Preset = Literal["cohort", "dr_grpo", "rloo"]

# A preset only sets keys of AlgorithmConfig; every key given in the config wins over it.
PRESETS: dict[str, dict[str, Any]] = {
    "cohort": {},
    # Dr. GRPO (arXiv 2503.20783): no division by std, constant length normaliser, symmetric clip.
    "dr_grpo": {"advantage": "centered", "aggregation": "constant", "clip_high": 0.2},
    # RLOO (arXiv 2402.14740): leave-one-out baseline.
    "rloo": {"advantage": "leave_one_out", "aggregation": "sequence", "clip_high": 0.2},
}


class AlgorithmConfig(BaseModel):
    """The policy-gradient update. A preset sets these keys; each can be set by itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    preset: Preset = Field("cohort", description="A named set of the keys below.")
    advantage: Literal["zscore", "centered", "leave_one_out"] = Field(
        "zscore",
        description="zscore: (r - mean)/std in the group (ddof 0); centered: r - mean; "
        "leave_one_out: r - mean of the others.",
    )
    aggregation: Literal["token", "sequence", "constant"] = Field(
        "token",
        description="token: mean over all tokens of the step; sequence: mean over completions of "
        "their token means; constant: token sum / (completions * max_tokens).",
    )
    clip_low: float = Field(0.2, gt=0, description="Ratios are clipped below at 1 - clip_low.")
    clip_high: float = Field(0.28, gt=0, description="Ratios are clipped above at 1 + clip_high.")
    drop_zero_variance: bool = Field(
        True, description="Leave out groups whose rewards are all equal: they carry no gradient."
    )

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, given: Any) -> Any:
        preset = given.get("preset", "cohort") if isinstance(given, dict) else None
        # A preset of a wrong type or name is left for the field's own check to report.
        if isinstance(preset, str) and preset in PRESETS:
            return {**PRESETS[preset], **given}
        return given
