"""An environment of several turns: the model guesses a number from "Higher." and "Lower.".

python examples/guess_number.py run.steps=40
"""

import random
import sys
from collections.abc import Mapping
from typing import Any

import cohort
from cohort.rewards.tasks import Row

NUMBERS = range(1, 10)
# A game that was played before: a small model answers in its form.
EXAMPLE = [
    {"role": "user", "content": "Guess my number from 1 to 9. Reply with a number only."},
    {"role": "assistant", "content": "5"},
    {"role": "user", "content": "Higher."},
    {"role": "assistant", "content": "7"},
    {"role": "user", "content": "Lower."},
    {"role": "assistant", "content": "6"},
    {"role": "user", "content": "Right. I have a new number. Guess it."},
]


class Games:
    """One row a game. The environment gives the rewards, so there are no reward functions."""

    rewards = ()

    def __init__(self, seed: int, rows: int = 500) -> None:
        self._seed, self._rows = seed, rows

    def train_size(self) -> int:
        return self._rows

    def eval_size(self) -> int:
        return 64

    def train_row(self, index: int) -> Row:
        number = random.Random(f"{self._seed} train {index}").choice(NUMBERS)
        return Row(f"train-{index}", EXAMPLE, {"number": number})

    def eval_row(self, index: int) -> Row:
        return Row(f"eval-{index}", EXAMPLE, {"number": NUMBERS[index % len(NUMBERS)]})


class Guess:
    """One game. See `cohort.Env` for what an environment may do."""

    def reset(self, row: Mapping[str, Any], seed: int) -> None:
        self.number = row["number"]

    def step(self, reply: cohort.Reply) -> cohort.Step:
        text = reply.text.strip()
        if not text.isdecimal() or int(text) not in NUMBERS:
            return cohort.Step("Reply with a number from 1 to 9 only.", reward=-0.2)
        guess = int(text)
        if guess == self.number:
            return cohort.Step("Right.", reward=1.0, done=True)
        return cohort.Step("Higher." if guess < self.number else "Lower.", reward=-0.1)


if __name__ == "__main__":
    overrides = [
        f"task.name={__file__}:Games",
        f"task.environment={__file__}:Guess",
        "environments.max_turns=5",
        "actors.max_tokens=6",
        "task.solved_at=0.6",
        "run.dir=runs/guess",
    ]
    config = cohort.load_config("deploy/configs/addition.yaml", [*overrides, *sys.argv[1:]])
    sys.exit(cohort.train(config))
