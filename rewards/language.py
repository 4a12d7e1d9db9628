"""Language consistency, as in DeepSeek-R1: the fraction of words in the target language."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import cache

from cohort.rewards.base import completion_texts, per_completion

# The scripts of a language, as the first words of Unicode's character names.
SCRIPTS: dict[str, frozenset[str]] = {
    **{name: frozenset({"LATIN"}) for name in ("en", "de", "fr", "es", "it", "pt", "vi")},
    **{name: frozenset({"CYRILLIC"}) for name in ("ru", "uk", "bg")},
    "zh": frozenset({"CJK"}),
    "ja": frozenset({"CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"}),
    "ko": frozenset({"HANGUL", "CJK"}),
    "ar": frozenset({"ARABIC"}),
    "el": frozenset({"GREEK"}),
    "he": frozenset({"HEBREW"}),
    "hi": frozenset({"DEVANAGARI"}),
    "th": frozenset({"THAI"}),
}
# Written without spaces: there every letter counts as a word.
UNSPACED = frozenset({"CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "THAI"})
# Formulas and tags are of no language.
FORMULA = re.compile(r"\$[^$\n]*\$|\\[a-zA-Z]+|</?[a-z_]+>")
WORD = re.compile(r"[^\W\d_]+")


@per_completion
def language_consistency(
    completions: Sequence[object], language: str = "en", **_: object
) -> list[float]:
    """The fraction of words written in the script of `language`; 0.0 without any word.

    After DeepSeek-R1 (arXiv:2501.12948, section 2.3.2), which counts words of the target language;
    here the script decides, so languages that share one are not told apart. Formulas do not count.

    Args:
        completions: Texts, or lists of messages.
        language: A code like "en".

    Returns:
        One score a completion, in [0, 1].

    Raises:
        ValueError: The scripts of the language are not known here.
    """
    if language not in SCRIPTS:
        raise ValueError(f"language {language!r} is not one of {', '.join(SCRIPTS)}")
    return [_fraction(text, SCRIPTS[language]) for text in completion_texts(completions)]


def _fraction(text: str, wanted: frozenset[str]) -> float:
    right = total = 0
    for word in WORD.findall(FORMULA.sub(" ", text)):
        scripts = [_script(letter) for letter in word]
        unspaced = [script for script in scripts if script in UNSPACED]
        right += sum(script in wanted for script in unspaced)
        total += len(unspaced)
        if len(unspaced) < len(scripts):
            right += all(script in wanted for script in scripts if script not in UNSPACED)
            total += 1
    return right / total if total else 0.0


@cache
def _script(letter: str) -> str:
    return unicodedata.name(letter, "NONE").split()[0]
