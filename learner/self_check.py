"""Is a model scored here as its own forward pass scores it, and by which attention?"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import torch

from cohort.learner.attention import Tree
from cohort.learner.logprobs import ModelInputs, PolicyModel, UnsupportedModel
from cohort.learner.shapes import RowShape

logger = logging.getLogger(__name__)

# Tokens of what is scored: a prompt with two completions.
PROMPT, FIRST, SECOND = 4, 3, 4


@torch.no_grad()
def self_check(policy: PolicyModel, temperature: float) -> None:
    """Score a shared-prompt row here and its second completion with the model's own forward.

    Where they differ, the architecture does not take its attention from outside (state-space
    models): its prompts are not shared. Decides `can_tree`, `can_flash`, `can_flex` and
    `shares_prompts` of the policy.

    Args:
        policy: Whole, on its device.
        temperature: Of the rollouts.

    Raises:
        UnsupportedModel: A row of its own is scored differently, too: the model transforms its
            logits in a way that the learner does not know; or `learner.attention` names a kernel
            that cannot be used.
    """
    row = _Row.of(policy)
    model, device = policy.model, row.ids.device
    theirs = row.expected(policy, temperature)
    # Log-probs of arbitrary tokens are around -10; bfloat16 keeps 8 bits of a logit.
    limit = _limit(policy)

    def error(row: _Row) -> float:
        try:
            ours = row.score(policy, temperature)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except (TypeError, ValueError, RuntimeError):
            return math.inf  # takes no positions, or no attention of ours
        return float((ours - theirs).abs().max())

    configured = policy.attention
    if policy.can_tree:
        policy.attention = "tree"  # auto would not take it on a GPU
        policy.can_tree = error(row) <= limit
        policy.attention = configured
    if configured == "tree" and not policy.can_tree:
        raise UnsupportedModel(
            f"{type(model).__name__} does not take its attention from outside: "
            "learner.attention=tree cannot be used; use auto"
        )
    for kernel in ("flash", "flex"):
        # Where the model has a window, flex is tried beside flash.
        if policy.kernel(device, policy.window is not None and kernel == "flex") != kernel:
            continue
        policy.attention = kernel
        problem = (
            "has no gradients on CPUs"
            if kernel == "flex" and device.type == "cpu"
            else _try(policy, row, temperature, theirs)
        )
        policy.attention = configured
        if kernel == "flash":
            policy.can_flash = problem is None
        else:
            policy.can_flex = problem is None
        if configured == kernel and problem is not None:
            raise UnsupportedModel(
                f"learner.attention={kernel} cannot be used: {problem}; use auto"
            )
        if policy.can_tree and problem is not None:
            instead = "flex" if policy.kernel(device) == "flex" else "sdpa under L x L masks"
            logger.warning("attention is computed by %s: %s %s", instead, kernel, problem)
    if configured != "tree":
        policy.shares_prompts = error(row) <= limit
    if policy.shares_prompts:
        return
    found = error(row.alone())
    if not found <= limit:
        raise UnsupportedModel(
            f"{type(model).__name__}: log-probs differ from the model's own by "
            f"{found:.3g} (limit {limit}); this architecture scales its logits in a way the "
            "learner does not support"
        )


@torch.no_grad()
def compile_if_it_works(
    policy: PolicyModel, temperature: float, required: bool, backend: Any = "inductor"
) -> None:
    """`PolicyModel.compile_parts`, tried forward and backward; nothing, where that fails.

    Args:
        policy: Whole, on its device, after `self_check`.
        temperature: Of the rollouts.
        required: By `learner.compile=on`.
        backend: torch.compile's.

    Raises:
        UnsupportedModel: It fails and is required.
    """
    row = _Row.of(policy)
    row = row if policy.shares_prompts else row.alone()
    expected = row.score(policy, temperature)
    policy.compile_parts(backend)
    problem = _try(policy, row, temperature, expected)
    if problem is None:
        return
    policy.compile_nothing()
    if required:
        raise UnsupportedModel(f"learner.compile=on cannot be used: {problem}; use auto or off")
    logger.warning("the learner is not compiled and slower (learner.compile): it %s", problem)


def check_adapters(policy: PolicyModel, temperature: float) -> None:
    """Raise UnsupportedModel unless every adapter of the policy has a part in its scores.

    Some architectures read a layer's weight beside its forward pass: an adapter there would be
    merged into what is published, and never be trained.

    Args:
        policy: Whole, on its device, with adapters.
        temperature: Of the rollouts.
    """
    row = _Row.of(policy)
    row = row if policy.shares_prompts else row.alone()
    trained = {name: p for name, p in policy.model.named_parameters() if p.requires_grad}
    with torch.enable_grad():
        score = row.score(policy, temperature).sum()
        gradients = torch.autograd.grad(score, list(trained.values()), allow_unused=True)
    unused = [name for name, found in zip(trained, gradients, strict=True) if found is None]
    if unused:
        raise UnsupportedModel(
            f"model.lora.targets: {unused[0].rpartition('.')[0]} of {type(policy.model).__name__} "
            "has no part in the log-probs of a text: name other layers"
        )


@dataclass(frozen=True)
class _Row:
    """Tokens to score: the second completion of a prompt, behind the first or alone."""

    ids: torch.Tensor
    position: torch.Tensor
    shape: RowShape

    @classmethod
    def of(cls, policy: PolicyModel) -> _Row:
        weight = policy.model.get_output_embeddings().weight
        length = PROMPT + FIRST + SECOND
        ids = (torch.arange(1, length + 1, device=weight.device) * 7919) % int(weight.shape[0])
        position = torch.arange(length, device=weight.device)
        position[PROMPT + FIRST :] -= FIRST
        return cls(ids, position, RowShape(PROMPT, (FIRST, SECOND)))

    def alone(self) -> _Row:
        ids = torch.cat([self.ids[:PROMPT], self.ids[-SECOND:]])
        return _Row(ids, torch.arange(len(ids), device=ids.device), RowShape(PROMPT, (SECOND,)))

    def score(self, policy: PolicyModel, temperature: float) -> torch.Tensor:
        """[SECOND] log-probs, by the policy."""
        predict = torch.arange(
            len(self.ids) - SECOND - 1, len(self.ids) - 1, device=self.ids.device
        )
        predict[0] = PROMPT - 1
        inputs = ModelInputs(
            self.ids, self.position, Tree((self.shape,)), predict, self.ids[-SECOND:]
        )
        scores: torch.Tensor = policy(inputs, temperature)[0]
        return scores

    def expected(self, policy: PolicyModel, temperature: float) -> torch.Tensor:
        """[SECOND] log-probs, by the model's own forward."""
        if policy.attention == "eager":
            policy.model.set_attn_implementation("eager")
        alone = self.alone().ids
        logits = policy.model(input_ids=alone[None], use_cache=False).logits[0, PROMPT - 1 : -1]
        logprobs = (logits.float() / temperature).log_softmax(-1)
        return logprobs.gather(1, self.ids[-SECOND:, None])[:, 0]


def _limit(policy: PolicyModel) -> float:
    return 1e-3 if next(policy.model.parameters()).dtype == torch.float32 else 0.5


def _try(policy: PolicyModel, row: _Row, temperature: float, expected: torch.Tensor) -> str | None:
    """Score forward and backward, which compiles what training needs.

    Returns:
        None where the log-probs are the expected ones, else what is wrong, in a line.
    """
    try:
        with torch.enable_grad():
            found = row.score(policy, temperature)
            weight = policy.model.get_input_embeddings().weight
            if not weight.requires_grad:  # only adapters are trained
                weight = next(p for p in policy.parameters() if p.requires_grad)
            (gradient,) = torch.autograd.grad(found.sum(), weight)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:  # noqa: BLE001 - a compiler's errors have no common class
        return f"failed with {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    difference = float((found - expected).abs().max())
    if difference <= _limit(policy) and bool(gradient.isfinite().all()):
        return None
    return f"differs from the model's own forward by {difference:.3g}"
