"""Penalties on how long and how repetitive a completion is, computed from its token ids.

The formulas are the papers'; the functions do what TRL's `get_soft_overlong_punishment` and
`get_repetition_penalty_reward` do (Apache-2.0), without needing TRL.
"""

from __future__ import annotations

from collections.abc import Sequence

from cohort.rewards.base import per_completion


@per_completion
def soft_overlong(
    completion_ids: Sequence[Sequence[int]], max_tokens: int, soft_tokens: int, **_: object
) -> list[float]:
    """0 up to max_tokens - soft_tokens, then falling to -1 at max_tokens, and -1 beyond.

    DAPO (arXiv:2503.14476), equation 13.

    Args:
        completion_ids: Token ids of each completion.
        max_tokens: As actors.max_tokens.
        soft_tokens: Before max_tokens, over which the score falls.

    Returns:
        One score a completion, in [-1, 0].

    Raises:
        ValueError: Unless 0 < soft_tokens <= max_tokens.
    """
    if not 0 < soft_tokens <= max_tokens:
        raise ValueError(
            f"soft_tokens={soft_tokens} must be above 0 and at most max_tokens={max_tokens}"
        )
    free = max_tokens - soft_tokens
    return [-min(1.0, max(0.0, (len(ids) - free) / soft_tokens)) for ids in completion_ids]


@per_completion
def repetition(
    completion_ids: Sequence[Sequence[int]], ngram: int = 3, max_penalty: float = -1.0, **_: object
) -> list[float]:
    """max_penalty times the fraction of n-grams of tokens that were there before.

    0 for fewer than `ngram` tokens. After "Demystifying Long Chain-of-Thought Reasoning"
    (arXiv:2502.03373), appendix C.2.

    Args:
        completion_ids: Token ids of each completion.
        ngram: Tokens of an n-gram.
        max_penalty: The score where everything is repeated, at most 0.

    Returns:
        One score a completion, in [max_penalty, 0].

    Raises:
        ValueError: Unless ngram >= 1 and max_penalty <= 0.
    """
    if ngram < 1 or max_penalty > 0:
        raise ValueError(f"ngram={ngram} must be at least 1, max_penalty={max_penalty} at most 0")
    return [max_penalty * _repeated(ids, ngram) for ids in completion_ids]


def _repeated(ids: Sequence[int], ngram: int) -> float:
    grams = list(zip(*(ids[start:] for start in range(ngram)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
