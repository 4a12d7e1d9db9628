"""What a task is: its rows, what every task offers, and what a task may offer besides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from cohort.actors.errors import CohortError
from cohort.actors.records import Messages
from cohort.rewards.config import RewardFunctionConfig
from cohort.rewards.rates import PassRates


class TaskError(CohortError, ValueError):
    """The task cannot give prompts; the message names the key, file or line to change."""


@dataclass(frozen=True)
class Row:
    """One row of a dataset.

    Attributes:
        id: Unique within its split, the same in every epoch and run.
        content: The prompt: chat messages, or a plain text.
        columns: Every other column; reward functions receive them by name.
        source: The dataset, level or part of a mixture that the row is of. Metrics and pass rates
            are counted for each source, so there should be a few dozen at most. None: not counted.
    """

    id: str
    content: Messages | str
    columns: Mapping[str, object] = field(default_factory=dict)
    source: str | None = None


@runtime_checkable
class Task(Protocol):
    """What a task must offer.

    `task.name` names its class as module:Class or path.py:Class. The class is called with `seed=`
    and the keys of `task.options`.

    Example:
        A task that asks to reverse words, for `task.name=reverse.py:Reverse`:

            class Reverse:
                rewards = ()  # set rewards.functions in the config

                def __init__(self, seed: int, words: str = "lamp river stone cloud") -> None:
                    self._words = words.split()

                def train_size(self) -> int:
                    return len(self._words) - 1

                def train_row(self, index: int) -> Row:
                    word = self._words[index]
                    return Row(word, f"Reverse: {word}\\n", {"answer": word[::-1]})

                def eval_size(self) -> int:
                    return 1

                def eval_row(self, index: int) -> Row:
                    return self.train_row(-1)
    """

    @property
    def rewards(self) -> tuple[RewardFunctionConfig, ...]:
        """The functions used when rewards.functions is not set; may be empty."""

    def train_size(self) -> int:
        """Rows in an epoch."""

    def train_row(self, index: int) -> Row:
        """Row `index` of the training split, always the same."""

    def eval_size(self) -> int:
        """Rows held out for evaluation."""

    def eval_row(self, index: int) -> Row:
        """Row `index` of the held-out split, always the same."""


@runtime_checkable
class Demonstrates(Protocol):
    """A task that can show how it is done, for `cohort warmup`."""

    def demonstration(self, row: Row, epoch: int) -> str | list[str] | None:
        """A good answer to a row of this task, as the model should write it.

        `cohort warmup` learns from training rows; of held-out rows it only measures the likelihood.

        Args:
            row: A row that this task made.
            epoch: Counted from 0. A task that knows several answers gives others in other epochs.

        Returns:
            The same for the same row and epoch; None where there is no answer to show. A list: the
            replies of an episode, which `task.environment` answers.
        """


@runtime_checkable
class Curriculum(Protocol):
    """A task that chooses the order of its training rows itself."""

    def choose(self, seed: int, cursor: int, rates: PassRates) -> tuple[int, Row]:
        """The row at a position of the endless training sequence.

        A pure function of its arguments, because runs are resumed from them. A row must not come
        twice in an epoch.

        Args:
            seed: The run's seed.
            cursor: The position, from 0.
            rates: How often each source was solved lately.

        Returns:
            The epoch, from 0, and the row.
        """


@runtime_checkable
class Fingerprinted(Protocol):
    """A task that knows digests of all of its rows; others are known by some of their rows."""

    def fingerprint(self) -> dict[str, str]:
        """Digests by name, which differ for other rows and for the same rows in another order."""


@runtime_checkable
class Measures(Protocol):
    """A task with metrics of its own, which `cohort eval` reports."""

    def metrics(self, rows: Sequence[Row], completions: Sequence[str]) -> dict[str, float]:
        """Metrics over held-out rows.

        Args:
            rows: One for each completion; rows may repeat.
            completions: What the model wrote.

        Returns:
            Metrics by name.
        """
