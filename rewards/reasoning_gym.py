"""Any task of reasoning-gym by its name, scored by its own scorer.

reasoning-gym (https://github.com/open-thought/reasoning-gym) makes its questions from a seed and a
number, so a row is made when it is asked for. It is imported inside functions: that takes seconds.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from cohort.actors.plain import JsonObject
from cohort.actors.records import Messages, derive_seed
from cohort.rewards.base import per_completion
from cohort.rewards.bounded import Bounded, TooMuch
from cohort.rewards.config import RewardFunctionConfig
from cohort.rewards.extract import final_parts, last_boxed, tagged
from cohort.rewards.task import Row, TaskError

if TYPE_CHECKING:
    from reasoning_gym.dataset import ProceduralDataset

# One question in so many is for evaluation, whatever the seeds.
HOLD_OUT_EVERY = 5
# Questions to try for one row; after them, the task has too few.
MAX_QUESTIONS = 100
# How long a scorer may take for one answer, and for those after one that took too long.
SECONDS, NEXT_S = 3.0, 1.0
# A longer answer does not count.
MAX_ANSWER = 20_000
ANSWER_IN = ("tags", "boxed", "text")
# Their questions depend on the order of Python's sets (found by making them in two processes).
UNORDERED = frozenset(
    {
        "intermediate_integration",
        "isomorphic_strings",
        "knight_swap",
        "polynomial_multiplication",
        "ransom_note",
        "word_ladder",
    }
)

# These scorers give the answer to eval() or to sympy's parser, which calls it. What a model writes
# must not run as a program, so an answer that is more than a literal or a formula is a wrong one.
SUMS = re.compile(r"(?!.*\*\*)[0-9+\-*/().\s]*", re.DOTALL)
LISTS = re.compile(r"[^().\\{}:=]*", re.DOTALL)
FUNCTIONS = "exp|log|ln|sqrt|pi|Abs|a?(?:sin|cos|tan)h?|sec|csc|cot"
FORMULA = re.compile(
    rf"(?:[0-9+\-*/^()\s]|(?<=[0-9])\.(?=[0-9])|(?<![A-Za-z])(?:[A-Za-z]|{FUNCTIONS})(?![A-Za-z]))*"
)
EVALUATED = {
    "countdown": SUMS,
    "puzzle24": SUMS,
    "binary_matrix": LISTS,
    "n_queens": LISTS,
    "spiral_matrix": LISTS,
    "string_insertion": LISTS,
    "simple_integration": FORMULA,
    "intermediate_integration": FORMULA,
    "polynomial_multiplication": FORMULA,
}


class ReasoningGymTask:
    """Questions of one reasoning-gym dataset, split by the hash of the question.

    A fifth of all possible questions is for evaluation: no question is in both splits, whatever the
    seeds. Columns: `entry`, what reasoning-gym made, and `dataset`, its name and config, are what
    the scorer needs; `answer` is the right answer, where there is one.

    Args:
        seed: The run's.
        name: Of the dataset: countdown, chain_sum, ...
        config: The dataset's own options.
        train_size: Training rows.
        eval_size: Held-out rows.
        answer_in: `tags` (`<answer>` and `</answer>`), `boxed`, or `text`: the whole completion.
        system: The name of a system prompt of reasoning-gym, another text, or None for none.

    Raises:
        TaskError: An option is wrong, or reasoning-gym is not installed.
    """

    def __init__(
        self,
        seed: int,
        name: str,
        config: Mapping[str, object] | None = None,
        train_size: int = 2000,
        eval_size: int = 200,
        answer_in: str = "tags",
        system: str | None = "DeepSeekZero",
    ) -> None:
        for option, value in (("train_size", train_size), ("eval_size", eval_size)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise TaskError(
                    f"task.options.{option} must be a whole number from 1 on, got {value!r}"
                )
        if answer_in not in ANSWER_IN:
            raise TaskError(
                f"task.options.answer_in must be one of {', '.join(ANSWER_IN)}, got {answer_in!r}"
            )
        if answer_in != "tags" and system == "DeepSeekZero":
            raise TaskError(
                f"task.options.answer_in={answer_in}, and the system prompt DeepSeekZero asks for "
                "answer tags: set task.options.system to a text of your own, or to null"
            )
        self._dataset: JsonObject = {"name": name, "config": dict(config or {})}
        self._sizes = {"train": train_size, "eval": eval_size}
        self._made = {
            split: _make_dataset(name, self._dataset["config"], size, seed, split)
            for split, size in self._sizes.items()
        }
        self._system = _system_prompt(system)
        self.rewards = (
            RewardFunctionConfig(path="reasoning_gym", options={"answer_in": answer_in}),
        )

    def train_size(self) -> int:
        return self._sizes["train"]

    def train_row(self, index: int) -> Row:
        return self._row("train", index)

    def eval_size(self) -> int:
        return self._sizes["eval"]

    def eval_row(self, index: int) -> Row:
        return self._row("eval", index)

    def _row(self, split: str, index: int) -> Row:
        size = self._sizes[split]
        if not 0 <= index < size:
            raise IndexError(f"row {index} of {size}")
        for attempt in range(MAX_QUESTIONS):
            entry = self._made[split][index + attempt * size]
            if _is_held_out(entry["question"]) == (split == "eval"):
                break
        else:
            raise TaskError(
                f"task.options: {self._dataset['name']} has too few different questions: none of "
                f"{MAX_QUESTIONS} was for the {split} split; widen task.options.config"
            )
        messages: Messages = [{"role": "user", "content": entry["question"]}]
        if self._system is not None:
            messages.insert(0, {"role": "system", "content": self._system})
        columns = {"answer": entry["answer"], "entry": entry, "dataset": self._dataset}
        return Row(f"{split}-{index}", messages, columns)


@per_completion
def score(
    completions: Sequence[object],
    entry: Sequence[JsonObject | None],
    dataset: Sequence[JsonObject | None],
    answer_in: str = "tags",
    prompts: Sequence[object] | None = None,
    prefills: Sequence[str] | None = None,
    **_: object,
) -> list[dict[str, float] | Exception | None]:
    """The score of reasoning-gym's own scorer, partial credit included.

    What a completion only thinks does not count (see `cohort.rewards.extract.final_part`). A
    completion without an answer is scored as reasoning-gym scores None.

    Args:
        completions: Texts, or lists of messages.
        entry: The column of the task; None where a row has none.
        dataset: The column of the task; None where a row has none.
        answer_in: See ReasoningGymTask.
        prompts: Of the completions.
        prefills: What each answer begins with in its prompt.

    Returns:
        For each completion `score`, in [0, 1], and `unreadable`: 1 where the scorer raises for this
        answer and not for the right one, the answer takes too much time or memory, or is code where
        a formula is wanted. Such an answer is wrong. None where the row has no entry.

    Raises:
        ValueError: `answer_in` is something else.
    """
    if answer_in not in ANSWER_IN:
        raise ValueError(f"answer_in must be one of {', '.join(ANSWER_IN)}, got {answer_in!r}")
    seconds = SECONDS
    scores: list[dict[str, float] | Exception | None] = []
    for text, item, made_by in zip(
        final_parts(completions, prefills, prompts), entry, dataset, strict=True
    ):
        if item is None or made_by is None:
            scores.append(None)
            continue
        # Made here too, so that the process that scores has it and all its imports from the start.
        _scorer(made_by["name"], json.dumps(made_by["config"], sort_keys=True))
        answer = None if text is None else _answer(text, answer_in)
        try:
            scores.append(_bounded(seconds, answer, item, made_by))
        except TooMuch:
            # `9**9**9**9`; where there are many of them, the rest have less time.
            scores.append({"score": 0.0, "unreadable": 1.0})
            seconds = NEXT_S
    return scores


def _score_one(
    answer: str | None, entry: JsonObject, dataset: JsonObject
) -> dict[str, float] | Exception:
    scorer = _scorer(dataset["name"], json.dumps(dataset["config"], sort_keys=True))
    # The dataset that made an entry of a composite one is named inside.
    kind = entry["metadata"].get("source_dataset", dataset["name"])
    allowed = EVALUATED.get(kind)
    if answer is not None and allowed is not None and not allowed.fullmatch(answer):
        return {"score": float(scorer.score_answer(None, entry)), "unreadable": 1.0}
    try:
        return {"score": float(scorer.score_answer(answer, entry)), "unreadable": 0.0}
    except MemoryError:
        raise
    # Some scorers raise for an answer that they cannot read.
    except Exception as error:  # noqa: BLE001
        try:
            scorer.score_answer(entry["answer"], entry)
        # The scorer cannot score even the right answer.
        except Exception:  # noqa: BLE001
            return RuntimeError(f"{type(error).__name__}: {error}")
        return {"score": 0.0, "unreadable": 1.0}


_bounded = Bounded(_score_one)


def _answer(text: str, answer_in: str) -> str | None:
    if answer_in == "tags":
        return tagged(text, "answer", MAX_ANSWER)
    if answer_in == "boxed":
        return last_boxed(text)
    return text.strip() if len(text) <= MAX_ANSWER else None


@lru_cache(maxsize=64)
def _scorer(name: str, config: str) -> ProceduralDataset:
    import reasoning_gym

    return reasoning_gym.create_dataset(name, seed=0, size=1, **json.loads(config))


def _is_held_out(question: str) -> bool:
    digest = hashlib.blake2b(question.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HOLD_OUT_EVERY == 0


def _make_dataset(
    name: str, config: Mapping[str, object], size: int, seed: int, split: str
) -> ProceduralDataset:
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise TaskError(
            f"task.name=reasoning_gym: {error}; pip install reasoning-gym==0.1.25"
        ) from error
    if name not in DATASETS:
        near = ", ".join(difflib.get_close_matches(str(name), DATASETS, n=3))
        hint = f"did you mean {near}?" if near else f"it has {', '.join(sorted(DATASETS))}"
        raise TaskError(f"task.options.name={name}: reasoning-gym has no such dataset; {hint}")
    for reserved in ("seed", "size"):
        if reserved in config:
            raise TaskError(
                f"task.options.config.{reserved}: leave it out; run.seed, task.options.train_size "
                "and task.options.eval_size say this"
            )
    if name in UNORDERED and not os.environ.get("PYTHONHASHSEED", "random").isdigit():
        raise TaskError(
            f"task.options.name={name}: its questions depend on the order of Python's sets, and a "
            "resumed run would get others: set the environment variable PYTHONHASHSEED=0"
        )
    # Room for the questions that belong to the other split.
    count = size * MAX_QUESTIONS
    number = derive_seed(seed, "reasoning_gym", split) % 2**31
    try:
        return reasoning_gym.create_dataset(name, seed=number, size=count, **config)
    # Datasets check their configs with assert; an unknown key is a TypeError.
    except (AssertionError, TypeError, ValueError, KeyError) as error:
        raise TaskError(f"task.options.config: {name} refuses it: {error}") from error


def _system_prompt(system: str | None) -> str | None:
    from reasoning_gym.utils import SYSTEM_PROMPTS

    if system is None or system in SYSTEM_PROMPTS:
        return None if system is None else str(SYSTEM_PROMPTS[system])
    if not isinstance(system, str) or not system.strip() or " " not in system.strip():
        raise TaskError(
            f"task.options.system={system!r}: neither one of {', '.join(SYSTEM_PROMPTS)}, nor a "
            "text of several words"
        )
    return system
