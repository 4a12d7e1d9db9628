"""Language, length and repetition."""

from __future__ import annotations

import time

import pytest

from cohort.rewards.language import language_consistency
from cohort.rewards.length import repetition, soft_overlong


@pytest.mark.parametrize(
    ("text", "language", "share"),
    [
        ("We add two and two.", "en", 1.0),
        ("We add 然后 two", "en", 3 / 5),
        ("我们 add 二", "zh", 3 / 4),
        ("我们把二加二", "zh", 1.0),
        ("ひらがなとカタカナと漢字", "ja", 1.0),
        ("Сложим два", "ru", 1.0),
        ("Сложим два", "en", 0.0),
        ("더하기", "ko", 1.0),
        # Formulas, commands and tags are of no language.
        (r"所以 $x + y = z$ \frac <think>", "zh", 1.0),
        # One Cyrillic letter in a Latin word.
        ("p\u0430y", "en", 0.0),
        ("12 + 13 = 25", "en", 0.0),
        ("١٢ ² ⑫", "en", 0.0),
        ("", "en", 0.0),
        ("\ud800", "en", 0.0),
    ],
)
def test_language(text: str, language: str, share: float) -> None:
    assert language_consistency([text], language) == [pytest.approx(share)]


def test_language_of_a_megabyte_and_of_none() -> None:
    started = time.perf_counter()
    texts = ["word " * 200_000, "字" * 10**6, "$" * 10**6, "\\" * 10**6, "<" * 10**6]
    assert language_consistency(texts, "zh") == [0.0, 1.0, 0.0, 0.0, 0.0]
    assert time.perf_counter() - started < 5
    with pytest.raises(ValueError, match="'xx' is not one of en, de"):
        language_consistency(["a"], "xx")


def test_soft_overlong_is_equation_13_of_dapo() -> None:
    lengths = [0, 80, 81, 90, 100, 101, 10_000]
    ids = [[1] * length for length in lengths]
    assert soft_overlong(ids, max_tokens=100, soft_tokens=20) == pytest.approx(
        [0.0, 0.0, -0.05, -0.5, -1.0, -1.0, -1.0]
    )
    for max_tokens, soft_tokens in [(100, 0), (100, 101), (0, 0)]:
        with pytest.raises(ValueError, match="soft_tokens"):
            soft_overlong(ids, max_tokens, soft_tokens)


def test_repetition_is_trls() -> None:
    # The example of TRL's get_repetition_penalty_reward.
    assert repetition([[1, 2, 3, 4], [5, 5, 5, 5, 5]], ngram=2) == pytest.approx([0.0, -0.75])
    assert repetition([[], [1], [1, 2], [1, 2, 3]]) == [0.0] * 4
    assert repetition([[7] * 10**6], max_penalty=-0.5) == [pytest.approx(-0.5, abs=1e-5)]
    for options in ({"ngram": 0}, {"max_penalty": 1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            repetition([[1]], **options)  # type: ignore[arg-type]
