"""The dataset task: rows of files or of a Hugging Face dataset, whatever their layout."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import string
from collections.abc import Mapping, Sequence
from typing import Any

from actors.records import Messages
from rewards.base import RESERVED_COLUMNS
from rewards.config import RewardFunctionConfig
from rewards.readers import Record, read_records
from rewards.tasks import Row, TaskError

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


class DatasetTask:
    """Rows of `task.data`, and held-out rows of `task.eval_data` or of a share of the prompts.

    Data: a file (.jsonl, .json, .csv, each also as .gz; .parquet), a glob of files, a folder, or a
    Hugging Face dataset like `openai/gsm8k?config=main&split=train` (without `split`: train, and
    test for eval_data). A row has `prompt` (a string, or a list of messages with `role` and
    `content`) and any other columns, which the reward functions receive by name; a column that a
    row does not have is None there.

    Options:
    columns: {ours: theirs}, for example {prompt: question}; `reward_model.ground_truth` is a value
        inside another column; null leaves a column out.
    layout: trl, verl (parquet of its own), skyrl, openrlhf, or auto: verl or skyrl where the rows
        have their columns, else trl. verl and skyrl give the right answer as `answer` and
        `ground_truth` too; `data_source` becomes the source of a row.
    answer_after: `answer` is only what follows the last of this text, "####" for GSM8K.
    chat: a prompt that is a string becomes the message of a user.
    system: a system message before the others; needs messages, or chat.
    template: a text with {prompt} (and {column}) that takes the place of the prompt, or of the last
        user message; braces of its own are doubled.
    demonstration: the column (ours) with a good answer, from which `cohort warmup` learns.
    eval_share: without eval_data, the share of different prompts that is held out (0.1). It is
        chosen by hash: the same prompts whatever the seed, the order of rows, system or template.

    No prompt is in both splits (texts that differ in whitespace only are the same): rows of data
    with a prompt of eval_data are left out of training, and said. Raises TaskError with file and
    row number for a bad row.
    """

    rewards: tuple[RewardFunctionConfig, ...] = ()

    def __init__(
        self,
        data: str,
        eval_data: str | None = None,
        columns: Columns | None = None,
        layout: str = "auto",
        answer_after: str | None = None,
        chat: bool = False,
        system: str | None = None,
        template: str | None = None,
        demonstration: str | None = None,
        eval_share: float = 0.1,
    ) -> None:
        if not isinstance(eval_share, (int, float)) or not 0 < eval_share < 1:
            raise TaskError(f"task.options.eval_share must be between 0 and 1, got {eval_share!r}")
        _check_columns(columns)
        _check_template(template)
        if layout != "auto" and layout not in LAYOUTS:
            raise TaskError(
                f"task.options.layout={layout}: must be one of auto, {', '.join(LAYOUTS)}"
            )

        def read(location: str, key: str, prefix: str, split: str) -> list[tuple[str, Row]]:
            records = read_records(location, key, split)
            chosen = _layout_of(records[0]) if layout == "auto" else layout
            mapping = {**LAYOUTS[chosen], **(columns or {})}
            found = [_mapped(record, mapping) for record in records]
            _check_found(records, mapping if chosen in MARKS else columns or {}, key)
            names = list(dict.fromkeys(name for values in found for name in values))
            rows = []
            for record, values in zip(records, found, strict=True):
                # As a dataset table: every row has every column.
                full = {name: values.get(name) for name in names}
                if answer_after is not None:
                    full["answer"] = _answer_after(full.get("answer"), answer_after, record.where)
                prompt = full.pop("prompt", None)
                _check_row(prompt, values, record.where)
                content = _content(prompt, full, template, chat, system, record.where)
                source = full.get(SOURCE_COLUMN) if chosen in MARKS else None
                named = source if isinstance(source, str) else None
                rows.append((_prompt_hash(prompt), Row(prefix + record.id, content, full, named)))
            return rows

        rows = read(data, "task.data", "", "train")
        if demonstration is not None and demonstration not in rows[0][1].columns:
            raise TaskError(
                f"task.options.demonstration={demonstration}: no such column in task.data; it has "
                f"{', '.join(rows[0][1].columns) or 'none'}"
            )
        self._demonstration = demonstration
        if eval_data is not None:
            held_out = read(eval_data, "task.eval_data", "eval-", "test")
            asked = {digest for digest, _ in held_out}
            self._train = [row for digest, row in rows if digest not in asked]
            self._eval = [row for _, row in held_out]
            leaked = len(rows) - len(self._train)
            if leaked:
                logger.warning(
                    "%d of %d rows of task.data have a prompt of task.eval_data: they are left out "
                    "of training",
                    leaked,
                    len(rows),
                )
            if not self._train:
                raise TaskError("task.eval_data has every prompt of task.data: nothing to train on")
            return
        hashes = sorted({digest for digest, _ in rows})
        if len(hashes) < 2:
            raise TaskError(
                f"{data} has one prompt only: nothing to hold out; add rows or set task.eval_data"
            )
        count = min(math.ceil(eval_share * len(hashes)), len(hashes) - 1)
        chosen_hashes = set(hashes[:count])
        self._train = [row for digest, row in rows if digest not in chosen_hashes]
        self._eval = [row for digest, row in rows if digest in chosen_hashes]

    def train_size(self) -> int:
        return len(self._train)

    def train_row(self, index: int) -> Row:
        return self._train[index]

    def eval_size(self) -> int:
        return len(self._eval)

    def eval_row(self, index: int) -> Row:
        return self._eval[index]

    def demonstration(self, row: Row, epoch: int) -> str | None:  # noqa: ARG002
        """The text of the row's column `task.options.demonstration`."""
        if self._demonstration is None:
            return None
        text = row.columns.get(self._demonstration)
        return None if text is None else str(text)


# Columns ------------------------------------------------------------------------------------------

_MISSING = object()


def _layout_of(first: Record) -> str:
    for layout, column in MARKS.items():
        value = first.values.get(column)
        if isinstance(value, dict) and "ground_truth" in value:
            logger.info("task.data has the layout of %s", layout)
            return layout
    return "trl"


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


def _mapped(record: Record, mapping: Columns) -> dict[str, Any]:
    """The row's columns under our names; those that are not mapped keep theirs."""
    renamed = {*mapping.values(), *(ours for ours, theirs in mapping.items() if theirs is None)}
    values = {name: value for name, value in record.values.items() if name not in renamed}
    for ours, theirs in mapping.items():
        found = _MISSING if theirs is None else _lookup(record.values, theirs)
        if found is not _MISSING:
            values[ours] = found
    return values


def _check_columns(columns: Columns | None) -> None:
    if columns is not None and not isinstance(columns, Mapping):
        raise TaskError(f"task.options.columns must be a mapping of ours: theirs, got {columns!r}")
    for ours, theirs in (columns or {}).items():
        if not isinstance(ours, str) or not (theirs is None or isinstance(theirs, str)):
            raise TaskError(f"task.options.columns: {ours!r}: {theirs!r} are not names of columns")


def _check_found(records: Sequence[Record], mapping: Columns, key: str) -> None:
    """A name that no row has is a mistake; where only some rows have it, others get None."""
    for ours, theirs in mapping.items():
        name = ours if theirs is None else theirs
        if all(_lookup(record.values, name) is _MISSING for record in records):
            raise TaskError(
                f"{records[0].where}: no row of {key} has '{name}', which task.options.columns or "
                f"layout names for {ours}; the columns are {', '.join(records[0].values)}"
            )


def _answer_after(answer: Any, mark: str, where: str) -> str:
    if not isinstance(answer, str) or mark not in answer:
        raise TaskError(f"{where}: no {mark!r} in 'answer' (task.options.answer_after)")
    return answer.rpartition(mark)[2].strip()


# Prompts ------------------------------------------------------------------------------------------


def _check_template(template: str | None) -> None:
    """Only plain names in braces: a format may reach into what it prints."""
    if template is None:
        return
    try:
        fields = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except (ValueError, TypeError, AttributeError) as error:
        raise TaskError(f"task.options.template: {error} (double the braces of a text)") from error
    names = [name for name, _, _ in fields]
    for name, form, conversion in fields:
        if not str(name).isidentifier() or form or conversion:
            raise TaskError(
                f"task.options.template: {{{name}}} is not the name of a column; double the braces "
                "of a text, as in \\boxed{{}}"
            )
    if "prompt" not in names:
        raise TaskError("task.options.template must have {prompt}")


def _check_row(prompt: Any, values: Mapping[str, Any], where: str) -> None:
    if "prompt" not in values:
        raise TaskError(
            f"{where}: no 'prompt' in the row; it has {', '.join(values) or 'nothing'} (name its "
            "column: task.options.columns: {prompt: ...})"
        )
    for name in RESERVED_COLUMNS:
        if name in values:
            raise TaskError(
                f"{where}: rename the column '{name}': reward functions get another "
                f"(task.options.columns: {{other_name: {name}}})"
            )
    problem = _content_problem(prompt)
    if problem:
        raise TaskError(f"{where}: {problem}")


def _content_problem(content: Any) -> str | None:
    if isinstance(content, str):
        return None if content.strip() else "'prompt' is empty"
    if not isinstance(content, list):
        return f"'prompt' must be a string or a list of messages, not a {type(content).__name__}"
    if not content:
        return "'prompt' is an empty list"
    for message in content:
        if not isinstance(message, dict):
            return f"a message must have role and content, not be a {type(message).__name__}"
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                return f"a message of 'prompt' has no text under '{name}'"
    return None


def _content(
    prompt: Any,
    columns: Mapping[str, Any],
    template: str | None,
    chat: bool,
    system: str | None,
    where: str,
) -> str | Messages:
    if isinstance(prompt, str):
        text = _filled(template, prompt, columns, where)
        if not chat:
            if system is not None:
                raise TaskError(
                    f"{where}: a prompt that is a string has no system message: set "
                    "task.options.chat=true, or leave out task.options.system"
                )
            return text
        messages: Messages = [{"role": "user", "content": text}]
    else:
        messages = list(prompt)
        users = [at for at, message in enumerate(messages) if message["role"] == "user"]
        if template is not None:
            if not users:
                raise TaskError(f"{where}: no message of a user for task.options.template")
            last = messages[users[-1]]
            text = _filled(template, last["content"], columns, where)
            messages[users[-1]] = {**last, "content": text}
    if system is None:
        return messages
    if messages[0]["role"] == "system":
        raise TaskError(f"{where}: has a system message already: leave out task.options.system")
    return [{"role": "system", "content": system}, *messages]


def _filled(template: str | None, prompt: str, columns: Mapping[str, Any], where: str) -> str:
    if template is None:
        return prompt
    try:
        return template.format_map({**columns, "prompt": prompt})
    except KeyError as error:
        raise TaskError(
            f"{where}: task.options.template names {error}, and the columns are "
            f"{', '.join(columns) or 'none'}"
        ) from error


def _prompt_hash(prompt: Any) -> str:
    """The same for texts that differ in whitespace only."""
    messages = [{"content": prompt}] if isinstance(prompt, str) else prompt
    turns = [(m.get("role"), " ".join(m["content"].split())) for m in messages]
    return hashlib.blake2b(json.dumps(turns).encode(), digest_size=16).hexdigest()
