"""`model.lora`: which adapters are trained. Light to import: the config's schema holds it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class LoraConfig(BaseModel):
    """Low-rank adapters beside the model's linear layers; see `cohort.learner.lora`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = Field(16, ge=1, description="Rows of A and columns of B: how much can be learned.")
    alpha: float = Field(32.0, gt=0, description="The adapters' product counts alpha / rank times.")
    targets: list[str] = Field(
        default_factory=list,
        description="Names of linear layers, or their ends, as [q_proj, v_proj]. Empty: all but "
        "the output layer.",
    )

    @property
    def scale(self) -> float:
        return self.alpha / self.rank
