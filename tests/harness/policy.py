"""The policy of the stand-ins: small enough for numpy, sharp enough to tell two versions apart.

A sequence's first part (its prompt) becomes one number, its state, through the embedding; the
next token's distribution is a softmax of the head and of that state. So a token depends on the
weights, and on the weights that its prompt was computed with: a stale prefix cache shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cohort.actors.records import Completion

Weights = dict[str, np.ndarray]
LEARNING_SCALE = 200.0
END = 2  # of tests.models.tiny_tokenizer


def initial(vocabulary: int, seed: int = 0) -> Weights:
    """The weights that every engine and every rank find in the model folder."""
    rng = np.random.default_rng(seed)
    embed, head = rng.normal(size=(2, vocabulary)).astype(np.float32)
    # One token in five ends its completion: their lengths differ.
    head[END] += 5.0
    return {"embed": embed, "head": head}


def _direction(vocabulary: int) -> np.ndarray:
    return np.cos(np.arange(vocabulary)).astype(np.float32)


def state(weights: Weights, prompt: Sequence[int]) -> float:
    """What a prompt leaves behind for the tokens after it (in vLLM: keys and values)."""
    return float(weights["embed"][list(prompt)].mean())


def distribution(weights: Weights, at: float, temperature: float) -> np.ndarray:
    """Log-probs of the next token."""
    logits = (weights["head"] + at * _direction(len(weights["head"]))) / temperature
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def score(weights: Weights, token_ids: Sequence[int]) -> list[float]:
    """Log-probs of tokens 1..n-1 at temperature 1: the first token is the prompt."""
    logprobs = distribution(weights, state(weights, token_ids[:1]), 1.0)
    return [float(logprobs[token]) for token in token_ids[1:]]


def gradient(
    weights: Weights, prompt: Sequence[int], tokens: np.ndarray, temperature: float
) -> Weights:
    """Of the sum of the tokens' log-probs."""
    logprobs = distribution(weights, state(weights, prompt), temperature)
    head = -len(tokens) * np.exp(logprobs)
    np.add.at(head, tokens, 1.0)
    head /= temperature
    slope = float(head @ _direction(len(head)))
    embed = np.zeros_like(head)
    np.add.at(embed, list(prompt), slope / len(prompt))
    return {"embed": embed.astype(np.float32), "head": head.astype(np.float32)}


def parts(
    prompt: Sequence[int], completion: Completion
) -> list[tuple[list[int], np.ndarray, np.ndarray]]:
    """What each turn continued, its sampled tokens, and the engine's log-probs of them."""
    if not completion.turns:
        return [(list(prompt), completion.token_ids, completion.logprobs)]
    found, sequences, at = [], [], 0
    for turn in completion.turns:
        shape = turn.shape
        parent = list(prompt) if shape.parent is None else sequences[shape.parent]
        context = [*parent[: shape.kept], *turn.inserted_ids.tolist()]
        end = at + shape.sampled
        found.append((context, completion.token_ids[at:end], completion.logprobs[at:end]))
        sequences.append([*context, *completion.token_ids[at:end].tolist()])
        at = end
    return found


def read(path: str | Path) -> Weights:
    """The weights in a published file."""
    from safetensors.numpy import load_file

    return load_file(str(path))


def as_tensors(weights: Weights) -> dict[str, Any]:
    """The same memory as torch tensors."""
    import torch

    return {name: torch.from_numpy(array) for name, array in weights.items()}
