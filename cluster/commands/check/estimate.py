"""The arithmetic of a check: memory of activations and caches, histograms, groups without signal.

Pure functions of numbers.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

# Histograms.
BARS = 30
BINS = 8


@dataclass(frozen=True)
class Architecture:
    """What the memory of a decoder depends on; `head` is the size of one attention head."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head: int
    vocabulary: int


def kv_bytes_per_token(model: Architecture, width: int) -> int:
    """Key-value cache of one token over all layers, in bytes; `width`: bytes of a number."""
    return 2 * model.layers * model.kv_heads * model.head * width


def activation_bytes(
    model: Architecture, width: int, tokens: int, checkpointing: bool = False
) -> int:
    """Bytes that a forward pass over `tokens` keeps for its backward pass, estimated.

    Counts what autograd saves in a Llama block: two norms (a float32 copy of the input, and two
    numbers in the model's width), queries, keys, values and the attention's output, and four
    tensors of the gated MLP; attention scores are assumed to be recomputed, as fused kernels do. In
    transformers 5.19, Llama and Qwen2 save up to 6 % more than this, GPT-2 up to 13 %.
    checkpointing: only each layer's input is kept, and one layer is recomputed at a time.
    """
    queries, keys = model.heads * model.head, model.kv_heads * model.head
    layer = (
        model.hidden * (8 + 4 * width)
        + width * (3 * queries + 2 * keys)
        + 4 * width * model.intermediate
    )
    if checkpointing:
        return tokens * (layer + model.layers * model.hidden * width)
    return tokens * model.layers * layer


def logit_bytes(model: Architecture, width: int, tokens: int) -> int:
    """Bytes of the outputs over the vocabulary of so many tokens, and of their gradient."""
    return 2 * tokens * model.vocabulary * width


def histogram(values: Sequence[int], bins: int = BINS) -> list[tuple[int, int, int]]:
    """(first, last, how many) of at most `bins` equally wide ranges that hold all values."""
    low, high = min(values), max(values)
    width = -(-(high - low + 1) // bins)
    counts = Counter((value - low) // width for value in values)
    return [
        (low + index * width, min(low + (index + 1) * width - 1, high), counts[index])
        for index in range((high - low) // width + 1)
    ]


def histogram_lines(values: Sequence[int], bins: int = BINS) -> list[str]:
    """A histogram for people: one line a range."""
    rows = histogram(values, bins)
    most = max(count for _, _, count in rows)
    names = [str(first) if first == last else f"{first}-{last}" for first, last, _ in rows]
    width = max(map(len, names))
    return [
        f"{name:>{width}}  {'#' * math.ceil(BARS * count / most):<{BARS}}  {count}"
        for name, (_, _, count) in zip(names, rows, strict=True)
    ]


def wilson(hits: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a fraction (95 % by default), which holds for few trials, too.

    E. B. Wilson, Probable inference, the law of succession, and statistical inference (1927).
    """
    rate, spread = hits / trials, z * z / trials
    centre = (rate + spread / 2) / (1 + spread)
    half = z * math.sqrt(rate * (1 - rate) / trials + spread / (4 * trials)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


def expected_equal(passed: Sequence[tuple[int, int]], size: int) -> float:
    """Expected fraction of groups of `size` completions of which all pass, or none.

    A prompt that passes with probability p gives such a group with p^size + (1-p)^size. The plug-in
    estimate p = passed/completions is biased, and no unbiased one exists for a size above the
    number of completions. So p is modelled as Beta-distributed over the prompts, and the result is
    averaged over the posterior of its mean (Jeffreys' prior) and its concentration (log-uniform
    prior from 0.01 to 1000).

    Args:
        passed: (passed, completions) of each prompt, for rewards with two values.
        size: Completions in a group.
    """
    seen = Counter(passed)
    steps_mean, steps_concentration = 64, 61
    total = weights = 0.0
    grid: list[tuple[float, float, float]] = []
    for i in range(steps_mean):
        mean = math.sin(math.pi / 2 * (i + 0.5) / steps_mean) ** 2
        for j in range(steps_concentration):
            concentration = 10 ** (-2 + 5 * j / (steps_concentration - 1))
            a, b = mean * concentration, (1 - mean) * concentration
            likelihood = sum(
                count * (_log_beta(a + c, b + n - c) - _log_beta(a, b))
                for (c, n), count in seen.items()
            )
            grid.append((likelihood, a, b))
    best = max(likelihood for likelihood, _, _ in grid)
    for likelihood, a, b in grid:
        weight = math.exp(likelihood - best)
        whole = _log_beta(a, b)
        equal = math.exp(_log_beta(a + size, b) - whole) + math.exp(_log_beta(a, b + size) - whole)
        total += weight * equal
        weights += weight
    return total / weights


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def two_valued(groups: Sequence[Sequence[float | None]]) -> list[tuple[int, int]] | None:
    """(how often the highest value, how many values) of each group; missing rewards are left out.

    None when there are more than two different values, or no value at all.
    """
    values = {value for group in groups for value in group if value is not None}
    if not 1 <= len(values) <= 2:
        return None
    high = max(values)
    kept = [[value for value in group if value is not None] for group in groups]
    return [(group.count(high), len(group)) for group in kept if group]
