"""A row as the dataset task reads it: its prompt, its columns under our names, its source."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

from cohort.actors.records import Messages
from cohort.rewards.base import RESERVED_COLUMNS
from cohort.rewards.readers import Record
from cohort.rewards.row_prompts import LAYOUTS, Columns, RowOptions, checked_prompt, read_texts
from cohort.rewards.task import TaskError

logger = logging.getLogger(__name__)

# What `layout: auto` knows a layout by; the first that fits.
MARKS = {"verl": "reward_model", "skyrl": "reward_spec"}
# Where verl and SkyRL say which dataset a row is of.
SOURCE_COLUMN = "data_source"
# The column that `final_assistant: demonstration` makes.
SHOWN = "demonstration"


class RowReader:
    """Splits rows into prompt and columns, by the layout that the first one has.

    Args:
        first: The first row.
        how: The options of the task.
    """

    def __init__(self, first: Record, how: RowOptions) -> None:
        self._how, self._first = how, first
        roots = {
            theirs.partition(".")[0] for theirs in how.columns.values() if theirs and "." in theirs
        }
        self._roots = tuple(sorted(roots))
        chosen = self._layout() if how.layout == "auto" else how.layout
        self._mapping = {**LAYOUTS[chosen], **how.columns}
        self._has_sources = chosen in MARKS
        self._prompt = self._mapping.get("prompt") or "prompt"
        named = self._mapping if chosen in MARKS else how.columns
        self._unseen = {ours: theirs or ours for ours, theirs in named.items()}
        self._continued = 0

    def read(self, record: Record) -> tuple[str | Messages | None, dict[str, object], str | None]:
        """The parts of a row.

        Returns:
            Its prompt (None: it is made of columns), its columns under our names, its source.

        Raises:
            TaskError: The row is wrong; with its place.
        """
        values, how, where = self._read_texts(record), self._how, record.where
        self._see(values)
        values = _mapped(values, self._mapping) if self._mapping else values
        if how.answer_after is not None:
            values["answer"] = _answer_after(values.get("answer"), how.answer_after, where)
        for name in RESERVED_COLUMNS:
            if name in values:
                raise TaskError(
                    f"{where}: rename the column '{name}': reward functions get another "
                    f"(task.options.columns: {{other_name: {name}}})"
                )
        if how.json_texts and self._mapping:
            # What is under our names only now, from inside another column for example.
            read_texts(values, "prompt", (), where)
        source = values.get(SOURCE_COLUMN) if self._has_sources else None
        prompt = None
        if "prompt" in values:
            if how.fields and "prompt" not in how.fields:
                raise TaskError(
                    f"{where}: has a prompt: task.options.template must have {{prompt}}"
                )
            prompt = checked_prompt(values.pop("prompt"), where)
            if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
                prompt = self._begun(prompt, values, record)
        elif not how.fields or "prompt" in how.fields:
            raise TaskError(
                f"{where}: no 'prompt' in the row; it has {', '.join(values) or 'nothing'} (name "
                "its column: task.options.columns: {prompt: ...}, or make it of columns: "
                "task.options.template)"
            )
        for name in how.fields:
            if name != "prompt" and values.get(name) is None:
                problem = (
                    "is empty (null) here"
                    if name in values
                    else f"is not a column; the columns are {', '.join(values) or 'none'}"
                )
                raise TaskError(f"{where}: task.options.template names '{name}', which {problem}")
        return prompt, values, source if isinstance(source, str) else None

    def require_names(self, key: str, rest: Iterator[Record]) -> None:
        """Check that some row has each name in columns or layout.

        A name that no row has is a mistake, and explains other errors; where only some rows have
        it, others get None.

        Args:
            key: The config key of the data.
            rest: The rows that were not read yet.

        Raises:
            TaskError: No row has a name.
        """
        while self._unseen and (record := next(rest, None)) is not None:
            self._see(self._read_texts(record))
        for ours, name in self._unseen.items():
            raise TaskError(
                f"{self._first.where}: no row of {key} has '{name}', which task.options.columns or "
                f"layout names for {ours}; the columns are {', '.join(self._first.values)}"
            )

    def finish(self, key: str, rows: int) -> None:
        """Check what depends on all rows together, once they are read.

        Args:
            key: The config key of the data.
            rows: How many there are.

        Raises:
            TaskError: As from `require_names`.
        """
        self.require_names(key, iter(()))
        if self._continued:
            logger.warning(
                "%d of %d rows of %s end in a message of the assistant, which the model continues; "
                "task.options.final_assistant=demonstration removes them from the prompt",
                self._continued,
                rows,
                key,
            )

    def _see(self, values: Mapping[str, object]) -> None:
        if self._unseen:
            self._unseen = {
                ours: theirs
                for ours, theirs in self._unseen.items()
                if _lookup(values, theirs) is _MISSING
            }

    def _read_texts(self, record: Record) -> dict[str, object]:
        if self._how.json_texts:
            read_texts(record.values, self._prompt, self._roots, record.where)
        return record.values

    def _layout(self) -> str:
        self._prompt = "prompt"
        values = self._read_texts(self._first)
        for layout, column in MARKS.items():
            value = values.get(column)
            if isinstance(value, dict) and "ground_truth" in value:
                logger.info("task.data has the layout of %s", layout)
                return layout
        return "trl"

    def _begun(self, prompt: Messages, values: dict[str, object], record: Record) -> Messages:
        """A prompt that ends in a message of the assistant, by task.options.final_assistant."""
        how = self._how.final_assistant
        if how == "auto" and self._prompt.rpartition(".")[2] != "prompt":
            raise TaskError(
                f"{record.where}: the last message of '{self._prompt}' is the assistant's. Say "
                "what it is: task.options.final_assistant=demonstration for an answer, which is "
                "removed from the prompt, or =continue for the beginning of one, which the model "
                "continues"
            )
        if how != "demonstration":
            self._continued += 1
            return prompt
        if len(prompt) < 2:
            raise TaskError(
                f"{record.where}: nothing but the assistant's message in '{self._prompt}' "
                "(task.options.final_assistant=demonstration)"
            )
        if SHOWN in values:
            raise TaskError(
                f"{record.where}: rename the column '{SHOWN}': "
                "task.options.final_assistant=demonstration makes one "
                f"(task.options.columns: {{other_name: {SHOWN}}})"
            )
        values[SHOWN] = prompt[-1]["content"]
        return prompt[:-1]


# Columns ------------------------------------------------------------------------------------------

_MISSING = object()


def _lookup(values: Mapping[str, object], name: str) -> object:
    """A column, or a value inside one by a dotted path; _MISSING where there is none."""
    if name in values:
        return values[name]
    found: object = values
    for part in name.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return _MISSING
        found = found[part]
    return found


def _mapped(given: Mapping[str, object], mapping: Columns) -> dict[str, object]:
    """The row's columns under our names; those that are not mapped keep theirs."""
    values = dict(given)
    for ours, theirs in mapping.items():
        values.pop(ours if theirs is None else theirs, None)
    for ours, theirs in mapping.items():
        found = _MISSING if theirs is None else _lookup(given, theirs)
        if found is not _MISSING:
            values[ours] = found
    return values


def _answer_after(answer: object, mark: str, where: str) -> str:
    if not isinstance(answer, str) or mark not in answer:
        raise TaskError(f"{where}: no {mark!r} in 'answer' (task.options.answer_after)")
    return answer.rpartition(mark)[2].strip()
