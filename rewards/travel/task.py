"""The travel task: queries of one level, split by content, with their reward functions."""

from __future__ import annotations

import random
from collections.abc import Sequence

from cohort.actors.records import derive_seed
from cohort.rewards.config import RewardFunctionConfig
from cohort.rewards.task import Row, TaskError
from cohort.rewards.travel.demonstrations import varied_plan
from cohort.rewards.travel.generate import LEVELS, Split, make_query
from cohort.rewards.travel.plan import to_json
from cohort.rewards.travel.prompt import messages
from cohort.rewards.travel.query import from_columns, to_columns
from cohort.rewards.travel.scores import evaluate, travelplanner_metrics


class TravelTask:
    """Trips to plan.

    A row is made when it is asked for, from the seed, the level, its split and its number; its only
    column is `query`. No query is in both splits, whatever the seeds.

    Args:
        seed: The run's.
        level: 1, the easiest, to 5.
        train_size: Training rows.
        eval_size: Held-out rows.

    Raises:
        TaskError: An option is wrong.
    """

    rewards = (RewardFunctionConfig(path="itinerary"),)

    def __init__(
        self, seed: int, level: int = 1, train_size: int = 2000, eval_size: int = 200
    ) -> None:
        if not _whole(level) or level not in LEVELS:
            raise TaskError(f"task.options.level must be 1 to {max(LEVELS)}, got {level!r}")
        for name, value in (("train_size", train_size), ("eval_size", eval_size)):
            if not _whole(value) or value < 1:
                raise TaskError(
                    f"task.options.{name} must be a whole number from 1 on, got {value!r}"
                )
        self._seed = seed
        self._level = level
        self._train_size = train_size
        self._eval_size = eval_size

    def train_size(self) -> int:
        return self._train_size

    def train_row(self, index: int) -> Row:
        return self._row("train", index, self._train_size)

    def eval_size(self) -> int:
        return self._eval_size

    def eval_row(self, index: int) -> Row:
        return self._row("eval", index, self._eval_size)

    def demonstration(self, row: Row, epoch: int) -> str | list[str]:
        """A plan that breaks no rule; in another epoch another one."""
        seed = derive_seed(self._seed, "demonstration", row.id, epoch)
        plan = varied_plan(from_columns(row.columns["query"]), random.Random(seed))
        return to_json(plan)

    def metrics(self, rows: Sequence[Row], completions: Sequence[str]) -> dict[str, float]:
        """TravelPlanner's published metrics; one completion for each row."""
        pairs = zip(rows, completions, strict=True)
        return travelplanner_metrics(
            [evaluate(from_columns(row.columns["query"]), text) for row, text in pairs]
        )

    def _row(self, split: Split, index: int, size: int) -> Row:
        if not 0 <= index < size:
            raise IndexError(f"row {index} of {size}")
        query = make_query(self._seed, self._level, split, index)
        return Row(f"{split}-{self._level}-{index}", messages(query), {"query": to_columns(query)})


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
