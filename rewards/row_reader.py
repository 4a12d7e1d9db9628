"""A row as the dataset task takes it apart: its prompt, its columns under our names, its source."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cohort.actors.records import Messages
from cohort.rewards.base import RESERVED_COLUMNS
from cohort.rewards.readers import Record
from cohort.rewards.row_prompts import content_of, content_problem, filled, read_texts
from cohort.rewards.task import TaskError

logger = logging.getLogger(__name__)

Columns = Mapping[str, str | None]

# Ours: theirs. `answer` is what the built-in rewards compare with, `ground_truth` what verl's read.
LAYOUTS: dict[str, dict[str, str | None]] = {
    "trl": {},
    "verl": {"answer": "reward_model.ground_truth", "ground_truth": "reward_model.ground_truth"},
    "skyrl": {"answer": "reward_spec.ground_truth", "ground_truth": "reward_spec.ground_truth"},
    "openrlhf": {"prompt": "input", "answer": "label", "label": "label"},
}
# What `layout: auto` knows a layout by; the first that fits.
MARKS = {"verl": "reward_model", "skyrl": "reward_spec"}
# Where verl and SkyRL say which dataset a row is of.
SOURCE_COLUMN = "data_source"
# What a last message of the assistant is.
FINAL_ASSISTANT = ("auto", "continue", "demonstration")
SHOWN = "demonstration"


@dataclass(frozen=True)
class RowOptions:
    """The options of the dataset task that say how a row is read. fields: of the template."""

    columns: Columns
    layout: str
    answer_after: str | None
    chat: bool
    system: str | None
    template: str | None
    fields: tuple[str, ...]
    final_assistant: str
    json_texts: bool


class RowReader:
    """Takes rows apart by the layout that the first one has."""

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

    def read(self, record: Record) -> tuple[Any, dict[str, Any], str | None]:
        """The row's prompt (None: it is made of columns), its columns under our names, its source.

        Raises TaskError with the row's place.
        """
        values, how = self._read_texts(record), self._how
        self._see(values)
        values = _mapped(values, self._mapping) if self._mapping else values
        if how.answer_after is not None:
            values["answer"] = _answer_after(values.get("answer"), how.answer_after, record.where)
        for name in RESERVED_COLUMNS:
            if name in values:
                raise TaskError(
                    f"{record.where}: rename the column '{name}': reward functions get another "
                    f"(task.options.columns: {{other_name: {name}}})"
                )
        source = values.get(SOURCE_COLUMN) if self._has_sources else None
        named = source if isinstance(source, str) else None
        if "prompt" not in values:
            if not how.fields or "prompt" in how.fields:
                raise TaskError(
                    f"{record.where}: no 'prompt' in the row; it has "
                    f"{', '.join(values) or 'nothing'} (name its column: task.options.columns: "
                    "{prompt: ...}, or make it of columns: task.options.template)"
                )
            return None, values, named
        if how.fields and "prompt" not in how.fields:
            raise TaskError(
                f"{record.where}: has a prompt: task.options.template must have {{prompt}}"
            )
        prompt = values.pop("prompt")
        if problem := content_problem(prompt):
            raise TaskError(f"{record.where}: {problem}")
        if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
            prompt = self._begun(prompt, values, record)
        return prompt, values, named

    def require_names(self, key: str, rest: Iterator[Record]) -> None:
        """Raise TaskError for a name in columns or layout that no row has, `rest` included.

        Such a name is a mistake, and explains other errors; where only some rows have it, others
        get None.
        """
        while self._unseen and (record := next(rest, None)) is not None:
            self._see(self._read_texts(record))
        for ours, name in self._unseen.items():
            raise TaskError(
                f"{self._first.where}: no row of {key} has '{name}', which task.options.columns or "
                f"layout names for {ours}; the columns are {', '.join(self._first.values)}"
            )

    def finish(self, key: str, rows: int) -> None:
        """Say what can only be said of all rows together; raises TaskError."""
        self.require_names(key, iter(()))
        if self._continued:
            logger.warning(
                "%d of %d rows of %s end in the assistant's words, which the model goes on from; "
                "task.options.final_assistant=demonstration takes them off the prompt",
                self._continued,
                rows,
                key,
            )

    def _see(self, values: Mapping[str, Any]) -> None:
        if self._unseen:
            self._unseen = {
                ours: theirs
                for ours, theirs in self._unseen.items()
                if _lookup(values, theirs) is _MISSING
            }

    def _read_texts(self, record: Record) -> dict[str, Any]:
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

    def _begun(self, prompt: Messages, values: dict[str, Any], record: Record) -> Messages:
        """A prompt that ends in the assistant's words, by task.options.final_assistant."""
        how = self._how.final_assistant
        if how == "auto" and self._prompt.rpartition(".")[2] != "prompt":
            raise TaskError(
                f"{record.where}: the last message of '{self._prompt}' is the assistant's. Say "
                "what it is: task.options.final_assistant=demonstration for an answer, which is "
                "taken off the prompt, or =continue for the beginning of one, which the model goes "
                "on from"
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


def asked(
    prompt: Any, values: Mapping[str, Any], how: RowOptions, record: Record
) -> str | Messages:
    """What the row asks; raises TaskError where a template cannot be filled."""
    for name in how.fields:
        if name != "prompt" and values.get(name) is None:
            raise TaskError(
                f"{record.where}: task.options.template names '{name}', which is empty (null) here"
                if name in values
                else f"{record.where}: task.options.template names '{name}', and the columns are "
                f"{', '.join(values) or 'none'}"
            )
    template = how.template
    if prompt is None:
        prompt, template = filled(template, None, values, record.where), None
        if problem := content_problem(prompt):
            raise TaskError(f"{record.where}: {problem} (task.options.template)")
    return content_of(prompt, values, template, how.chat, how.system, record.where)


# Columns ------------------------------------------------------------------------------------------

_MISSING = object()


def _lookup(values: Mapping[str, Any], name: str) -> Any:
    """A column, or a value inside one by a dotted path; _MISSING where there is none."""
    if name in values:
        return values[name]
    found: Any = values
    for part in name.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return _MISSING
        found = found[part]
    return found


def _mapped(given: Mapping[str, Any], mapping: Columns) -> dict[str, Any]:
    """The row's columns under our names; those that are not mapped keep theirs."""
    values = dict(given)
    for ours, theirs in mapping.items():
        values.pop(ours if theirs is None else theirs, None)
    for ours, theirs in mapping.items():
        found = _MISSING if theirs is None else _lookup(given, theirs)
        if found is not _MISSING:
            values[ours] = found
    return values


def _answer_after(answer: Any, mark: str, where: str) -> str:
    if not isinstance(answer, str) or mark not in answer:
        raise TaskError(f"{where}: no {mark!r} in 'answer' (task.options.answer_after)")
    return answer.rpartition(mark)[2].strip()
