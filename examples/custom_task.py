"""A task of your own, and a run that trains on it.

python examples/custom_task.py run.steps=10
"""

import sys

import cohort
from cohort.rewards.config import RewardFunctionConfig
from cohort.rewards.tasks import Row


class Multiplication:
    """Products of two digits. See `cohort.Task` for what a task must offer."""

    rewards = (RewardFunctionConfig(path="exact_number"),)

    def __init__(self, seed: int, highest: int = 9) -> None:
        self._numbers = highest + 1

    def train_size(self) -> int:
        return self._numbers**2 - self.eval_size()

    def eval_size(self) -> int:
        return self._numbers

    def train_row(self, index: int) -> Row:
        return self._row(index)

    def eval_row(self, index: int) -> Row:
        return self._row(self.train_size() + index)

    def _row(self, index: int) -> Row:
        # Spread, so that the held-out rows are not all of one factor.
        a, b = divmod(index * 37 % self._numbers**2, self._numbers)
        question = f"What is {a} * {b}? Answer with the number alone."
        return Row(
            id=f"{a}x{b}",
            content=[{"role": "user", "content": question}],
            columns={"answer": str(a * b)},
        )


if __name__ == "__main__":
    overrides = [f"task.name={__file__}:Multiplication", "run.dir=runs/multiplication"]
    config = cohort.load_config("deploy/configs/addition.yaml", [*overrides, *sys.argv[1:]])
    sys.exit(cohort.train(config))
