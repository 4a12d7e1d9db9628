"""Is a model scored here as its own forward pass scores it, and by which attention?"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable

import torch

from cohort.learner.attention import Tree
from cohort.learner.logprobs import ModelInputs, PolicyModel, UnsupportedModel
from cohort.learner.shapes import RowShape

logger = logging.getLogger(__name__)


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
    model = policy.model
    device = next(model.parameters()).device
    vocabulary = int(model.get_output_embeddings().weight.shape[0])
    prompt, first, second = 4, 3, 4
    length = prompt + first + second
    ids = (torch.arange(1, length + 1, device=device) * 7919) % vocabulary
    position = torch.arange(length, device=device)
    position[prompt + first :] -= first
    target = ids[prompt + first :]
    alone = torch.cat([ids[:prompt], target])
    if policy.attention == "eager":
        model.set_attn_implementation("eager")
    logits = model(input_ids=alone[None], use_cache=False).logits[0, prompt - 1 : -1]
    theirs = (logits.float() / temperature).log_softmax(-1).gather(1, target[:, None])[:, 0]
    # Log-probs of arbitrary tokens are around -10; bfloat16 keeps 8 bits of a logit.
    precise = next(model.parameters()).dtype == torch.float32
    limit = 1e-3 if precise else 0.5

    def score(row: torch.Tensor, position: torch.Tensor, shape: RowShape) -> torch.Tensor:
        predict = torch.arange(len(row) - second - 1, len(row) - 1, device=device)
        predict[0] = prompt - 1
        inputs = ModelInputs(row, position, Tree((shape,)), predict, target)
        scores: torch.Tensor = policy(inputs, temperature)[0]
        return scores

    def error(row: torch.Tensor, position: torch.Tensor, shape: RowShape) -> float:
        try:
            ours = score(row, position, shape)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except (TypeError, ValueError, RuntimeError):
            return math.inf  # takes no positions, or no attention of ours
        return float((ours - theirs).abs().max())

    shared = RowShape(prompt, (first, second))
    configured = policy.attention
    if policy.can_tree:
        policy.attention = "tree"  # auto would not take it on a GPU
        policy.can_tree = error(ids, position, shared) <= limit
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
        problem = _try(policy, kernel, lambda: score(ids, position, shared), theirs, limit)
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
        policy.shares_prompts = error(ids, position, shared) <= limit
    if policy.shares_prompts:
        return
    found = error(alone, torch.arange(len(alone), device=device), RowShape(prompt, (second,)))
    if not found <= limit:
        raise UnsupportedModel(
            f"{type(model).__name__}: log-probs differ from the model's own by "
            f"{found:.3g} (limit {limit}); this architecture scales its logits in a way the "
            "learner does not support"
        )


def _try(
    policy: PolicyModel,
    kernel: str,
    score: Callable[[], torch.Tensor],
    expected: torch.Tensor,
    limit: float,
) -> str | None:
    """Score forward and backward, which compiles what training needs.

    Returns:
        None where the log-probs are the expected ones, else what is wrong, in a line.
    """
    if kernel == "flex" and expected.is_cpu:
        return "has no gradients on CPUs"
    try:
        with torch.enable_grad():
            found = score()
            weight = policy.model.get_input_embeddings().weight
            (gradient,) = torch.autograd.grad(found.sum(), weight)
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise
    except Exception as error:  # noqa: BLE001 - a compiler's errors have no common class
        return f"failed with {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    difference = float((found - expected).abs().max())
    if difference <= limit and bool(gradient.isfinite().all()):
        return None
    return f"differs from the model's own forward by {difference:.3g}"
