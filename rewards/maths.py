"""Mathematical answers, compared by value: fractions, roots, sets, intervals, equations.

The comparison is math-verify's (https://github.com/huggingface/Math-Verify, Apache-2.0), which
TRL, verl and Open-R1 use too.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Sequence

from cohort.rewards.answer import parse_number, same_text
from cohort.rewards.base import completion_texts, per_completion
from cohort.rewards.bounded import Bounded, TooMuch
from cohort.rewards.extract import AnswerIn, answer_of, beginnings, last_boxed, question_of

# Where one answer of a call has used up its time, how long each of the others may take.
NEXT_S = 1.0


def _not_about_timeouts(record: logging.LogRecord) -> bool:
    return "Timeout is disabled" not in record.getMessage()


@per_completion
class MathAnswer:
    """1.0 where the completion's answer equals the column `answer` in value, else 0.0.

    The answer is read in the final part of the completion: what it only thinks does not count. An
    answer that takes too long or too much memory is wrong, and the next ones of the call get
    NEXT_S. A right answer that cannot be read in time is an error ("timeout"). None where the row
    has no answer. Where the right answer is a plain number, an expression that stands in the
    question ("2 + 10") is wrong.

    Args:
        answer_in: "boxed" (the last LaTeX box) or "tags" (`<answer>...</answer>`, once).
        timeout_s: Whole seconds of CPU time for reading and comparing one answer.

    Raises:
        ImportError: math-verify is not installed.
    """

    def __init__(self, answer_in: AnswerIn = "boxed", timeout_s: int = 5) -> None:
        try:
            from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
        except ImportError as error:
            raise ImportError(
                "math-verify is not installed: pip install math-verify[antlr4_13_2]"
            ) from error
        answer_of("", answer_in)
        if not isinstance(timeout_s, int) or timeout_s < 1:
            raise ValueError(f"timeout_s must be a whole number of seconds, got {timeout_s!r}")
        self._answer_in = answer_in
        self._timeout_s = timeout_s
        self._parse, self._verify = parse, verify
        for module in ("parser", "grader"):
            logging.getLogger(f"math_verify.{module}").addFilter(_not_about_timeouts)
        boxed = LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)
        self._how_given = [boxed]
        self._how_known = [boxed, ExprExtractionConfig()]
        self._expected = functools.lru_cache(maxsize=256)(self._read_known)
        self._bounded = Bounded(self._compare)
        self._one_at_a_time = threading.Lock()

    def __call__(
        self,
        /,
        prompts: Sequence[object],
        completions: Sequence[object],
        answer: Sequence[object],
        prefills: Sequence[str] | None = None,
        **_: object,
    ) -> list[float | Exception | None]:
        texts = completion_texts(completions)
        questions = [question_of(prompt) for prompt in prompts]
        begun = beginnings(len(texts), prefills, prompts)
        seconds = float(self._timeout_s)
        scores: list[float | Exception | None] = []
        with self._one_at_a_time:
            for question, text, known, prefill in zip(questions, texts, answer, begun, strict=True):
                if known is None:
                    scores.append(None)
                    continue
                try:
                    scores.append(self._score(question, text, str(known), prefill, seconds))
                except TooMuch:
                    scores.append(0.0)
                    seconds = min(seconds, NEXT_S)
        return scores

    def _score(
        self, question: str, text: str, known: str, prefill: str, seconds: float
    ) -> float | Exception:
        """Raises TooMuch for an answer that takes too much."""
        given = answer_of(text, self._answer_in, prefill)
        if given is None:
            return 0.0
        given, known = _bare(given), _bare(known)
        if same_text(given, known):
            return 1.0
        if parse_number(known) is not None and _squeezed(given) in _squeezed(question):
            return 0.0
        try:
            self._bounded(self._timeout_s, None, known)
        except TooMuch as error:
            return TimeoutError(f"the row's answer {known[:80]!r} cannot be read: {error}")
        return float(self._bounded(seconds, given, known))

    def _compare(self, given: str | None, known: str) -> bool:
        """In the bounded process. given: None to read and remember only the right answer."""
        expected = self._expected(known)
        if given is None or not expected:
            return False
        found = self._read(given, self._how_given)
        return bool(found) and self._equal(expected, found)

    def _read_known(self, known: str) -> list[object]:
        return self._read(known, self._how_known)

    def _read(self, text: str, how: list[object]) -> list[object]:
        try:
            return list(
                self._parse(
                    f"\\boxed{{{text}}}",
                    extraction_config=how,
                    extraction_mode="first_match",
                    parsing_timeout=None,
                    raise_on_error=True,
                )
            )
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001  what sympy cannot read is not an answer
            return []

    def _equal(self, expected: list[object], given: list[object]) -> bool:
        try:
            return bool(self._verify(expected, given, timeout_seconds=None, raise_on_error=True))
        except MemoryError:
            raise
        except Exception:  # noqa: BLE001  what sympy cannot compare is not shown to be equal
            return False


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _bare(answer: str) -> str:
    """The answer without dollar signs and its own box around it."""
    inner = last_boxed(answer)
    return (answer if inner is None else inner).strip().strip("$").strip()
