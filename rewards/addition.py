"""The addition task: sums of two numbers, for a first run and for tests."""

from __future__ import annotations

import random
from collections.abc import Iterable

from cohort.actors.records import derive_seed
from cohort.rewards.config import RewardFunctionConfig
from cohort.rewards.task import Row, TaskError


class AdditionTask:
    """Sums of two numbers in [min_operand, max_operand], asked in a chat message.

    A fifth of the unordered pairs, chosen by the seed, is held out: 3 + 4 and 4 + 3 are in the same
    split.

    Args:
        seed: Decides which pairs are held out.
        max_operand: The largest number, at most 999.
        min_operand: The smallest number, from 0 on.
    """

    rewards = (RewardFunctionConfig(path="exact_number", weight=1.0),)
    HOLD_OUT_EVERY = 5

    def __init__(self, seed: int, max_operand: int = 9, min_operand: int = 1) -> None:
        for name, value in (("max_operand", max_operand), ("min_operand", min_operand)):
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 999:
                raise TaskError(f"task.options.{name} must be a whole number 0-999, got {value!r}")
        if min_operand >= max_operand:
            raise TaskError(
                f"task.options.min_operand={min_operand} must be less than "
                f"task.options.max_operand={max_operand}"
            )
        operands = range(min_operand, max_operand + 1)
        pairs = [(a, b) for a in operands for b in operands if a <= b]
        random.Random(derive_seed(seed, "addition", "split")).shuffle(pairs)
        held_out = set(pairs[:: self.HOLD_OUT_EVERY])
        self._train = _both_orders(pair for pair in pairs if pair not in held_out)
        self._eval = _both_orders(held_out)

    def train_size(self) -> int:
        return len(self._train)

    def train_row(self, index: int) -> Row:
        return self._row(self._train[index])

    def eval_size(self) -> int:
        return len(self._eval)

    def eval_row(self, index: int) -> Row:
        return self._row(self._eval[index])

    def demonstration(self, row: Row, epoch: int) -> str:  # noqa: ARG002
        """The sum, which is the only answer."""
        return str(row.columns["answer"])

    @staticmethod
    def _row(pair: tuple[int, int]) -> Row:
        a, b = pair
        text = f"What is {a} + {b}? Reply with the number only."
        return Row(f"{a}+{b}", [{"role": "user", "content": text}], {"answer": a + b})


def _both_orders(pairs: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    return sorted({pair for a, b in pairs for pair in ((a, b), (b, a))})
