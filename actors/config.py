"""The `actors` section of the config."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class ActorsConfig(BaseModel):
    """Rollout actors: how many, how they sample, what they may use."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    count: int = Field(1, ge=1, description="Rollout actors; each runs one vLLM engine.")
    min_count: int | None = Field(
        None,
        ge=1,
        description="With min_count or max_count, the run has between so many actors: more while "
        "the learner waits for completions over a quarter of the time, fewer while it waits for "
        "none. Empty: count.",
    )
    max_count: int | None = Field(None, ge=1, description="See min_count. Empty: count.")
    max_staleness: int = Field(
        0,
        ge=0,
        description="Steps a completion may lag behind the learner. 0 is synchronous training.",
    )
    max_tokens: int = Field(256, ge=1, description="Longest completion, in tokens.")
    temperature: float = Field(1.0, gt=0, description="Sampling temperature; also the learner's.")
    max_concurrent: int = Field(256, ge=1, description="Completions an engine works on at once.")
    kv_cache_gib: float = Field(
        1.0, gt=0, description="Key-value cache of one CPU engine, GiB. GPUs use gpu_memory."
    )
    gpu_memory: float = Field(
        0.85, gt=0, le=1, description="Share of a GPU's memory that an engine may take."
    )
    tensor_parallel: int = Field(1, ge=1, description="GPUs of one engine.")
    compile: bool = Field(
        False, description="torch.compile in the engine: faster steps, a much longer start."
    )
    quantization: Literal["none", "fp8"] = Field(
        "none",
        description="fp8: the engine's linear layers in float8, quantized again at every weight "
        "update. On CPUs it is emulated, for trying out.",
    )
    start_timeout_s: float = Field(
        300,
        gt=0,
        description="Longest wait for an engine to start. When no actor is left, a run waits so "
        "long for one that can start, then saves and ends.",
    )
    group_timeout_s: float = Field(
        120,
        gt=0,
        description="Longest time that an engine with groups to generate may show no progress (a "
        "token, an update); five times as long while it computes. Then it is replaced and its "
        "groups are generated elsewhere. One whose process is stopped, or sleeps with work to do, "
        "is replaced after 10 s already; a slow one that produces tokens never.",
    )
    sync_timeout_s: float = Field(
        120, gt=0, description="Longest time without progress that a weight update may take."
    )
    probe_tolerance: float | None = Field(
        None,
        gt=0,
        description="Largest mean |log-prob difference| between engine and learner on the probe "
        "sequence after a weight update. Empty: at the first update 0.5 in bfloat16, 0.1 in "
        "float16, 0.01 in float32, 1 where either computes in float8; from then on five times "
        "what the first one showed, where that is less, but no less than a tenth of these.",
    )

    @property
    def elastic(self) -> bool:
        """Whether the run itself changes how many actors it has."""
        return self.min_count is not None or self.max_count is not None

    @property
    def fewest(self) -> int:
        """The least number of actors that an elastic run has."""
        return self.count if self.min_count is None else self.min_count

    @property
    def most(self) -> int:
        """The greatest number of actors that an elastic run has."""
        return self.count if self.max_count is None else self.max_count
