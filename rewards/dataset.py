"""The dataset task: rows of files or of a Hugging Face dataset, whatever their layout."""

from __future__ import annotations

import json
import logging
import math
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from cohort.actors.records import Messages
from cohort.rewards.config import RewardFunctionConfig
from cohort.rewards.readers import Record, read_records
from cohort.rewards.row_prompts import (
    Columns,
    RowOptions,
    byte_length,
    content_of,
    prompt_digest,
    template_fields,
)
from cohort.rewards.row_reader import SHOWN, RowReader
from cohort.rewards.row_store import RowStore
from cohort.rewards.survey import Survey
from cohort.rewards.task import Row, TaskError

logger = logging.getLogger(__name__)


class DatasetTask:
    """Rows of `task.data`, and held-out rows of `task.eval_data` or of a fraction of the prompts.

    Data: a file (.jsonl, .json, .csv, each also as .gz, .zst, .bz2 or .xz; .parquet), a glob of
    files, a folder, or a Hugging Face dataset like `openai/gsm8k?config=main&split=train` (without
    `split`: train, and test for eval_data). A row has `prompt` (a string, or a list of messages
    with `role` and `content`) and any other columns, which the reward functions receive by name; a
    column that a row does not have is None there. Rows are kept on disk, where they are many.

    No prompt is in both splits (texts that differ in whitespace only are the same): rows of data
    with a prompt of eval_data are left out of training, which a warning says.

    Args:
        data: `task.data`.
        eval_data: `task.eval_data`.
        columns: {ours: theirs}, for example {prompt: question}; `reward_model.ground_truth` is a
            value inside another column; null leaves a column out.
        layout: trl, verl (parquet of its own), skyrl, openrlhf, or auto: verl or skyrl where the
            rows have their columns, else trl. verl and skyrl give the right answer as `answer` and
            `ground_truth` too; `data_source` becomes the source of a row.
        answer_after: `answer` is only what follows the last of this text, "####" for GSM8K.
        chat: A prompt that is a string becomes the message of a user.
        system: A system message before the others; needs messages, or chat.
        template: A text with {prompt} (and {column}) that replaces the prompt, or the last user
            message; braces of its own are doubled. Rows without a prompt are made of its columns:
            "Use {nums} to make {target}."
        final_assistant: What a last message of the assistant is. continue: the beginning of the
            answer, which the model goes on from. demonstration: an answer, which is removed from
            the prompt and becomes the column `demonstration`. auto: continue where the column is
            called `prompt`; in any other (`messages`) one of the two must be chosen.
        demonstration: The column (ours) from which `cohort warmup` learns: a good answer or, where
            there is an environment, the list of an episode's replies.
        json_texts: Messages, reward_model, reward_spec, extra_info, tests and columns of a dotted
            path that are text in JSON (as in CSV) are read.
        eval_share: Without eval_data, the fraction of different prompts that is held out. It is
            chosen by hash: the same prompts whatever the seed, the order of rows, system or
            template.

    Raises:
        TaskError: An option is wrong, or a row is; with its file and number.
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
        final_assistant: str = "auto",
        demonstration: str | None = None,
        json_texts: bool = True,
        eval_share: float = 0.1,
    ) -> None:
        if not isinstance(eval_share, (int, float)) or not 0 < eval_share < 1:
            raise TaskError(f"task.options.eval_share must be between 0 and 1, got {eval_share!r}")
        how = RowOptions(
            columns={} if columns is None else columns,
            layout=layout,
            answer_after=answer_after,
            chat=chat,
            system=system,
            template=template,
            fields=template_fields(template),
            final_assistant=final_assistant,
            json_texts=json_texts,
        )
        if final_assistant == "demonstration" and demonstration is None:
            demonstration = SHOWN
        self._demonstration = demonstration
        self._rows = self._eval_rows = _read(data, "task.data", "", "train", how)
        names = list(self._rows.names)
        if demonstration is not None and demonstration not in names:
            raise TaskError(
                f"task.options.demonstration={demonstration}: no such column in task.data; it has "
                f"{', '.join(names) or 'none'}"
            )
        if eval_data is None:
            held_out = _held_out(self._rows, eval_share, data)
            self._eval = np.flatnonzero(held_out)
        else:
            self._eval_rows = _read(eval_data, "task.eval_data", "eval-", "test", how)
            held_out = _leaked(self._rows, self._eval_rows)
            self._eval = np.arange(len(self._eval_rows.store))
        self._train = np.flatnonzero(~held_out)

    def train_size(self) -> int:
        return len(self._train)

    def train_row(self, index: int) -> Row:
        return self._rows.row(self._train[index])

    def eval_size(self) -> int:
        return len(self._eval)

    def eval_row(self, index: int) -> Row:
        return self._eval_rows.row(self._eval[index])

    def demonstration(self, row: Row, epoch: int) -> str | list[str] | None:  # noqa: ARG002
        """The row's column `task.options.demonstration`: a text, or the replies of an episode."""
        if self._demonstration is None:
            return None
        shown: Any = row.columns.get(self._demonstration)
        return str(shown) if isinstance(shown, int | float) else shown

    def survey(self) -> Survey:
        """See `cohort.rewards.survey.Surveys`."""
        train, held_out = (
            np.frombuffer(rows.sizes, dtype=np.uint32)[chosen].astype(np.int64)
            for rows, chosen in ((self._rows, self._train), (self._eval_rows, self._eval))
        )
        sources = frozenset(self._rows.sources | self._eval_rows.sources)
        return Survey(train, held_out, sources)

    def fingerprint(self) -> dict[str, str]:
        """Digests of all rows as they were read, in their order, under the options that say how."""
        return {"data": self._rows.store.digest(), "eval_data": self._eval_rows.store.digest()}


# Reading ------------------------------------------------------------------------------------------


@dataclass
class _Table:
    """All rows of one location. store: [place, prompt, columns, source] of each, in their order.

    names: of all columns. sizes: bytes of each prompt. digest: 16 bytes for each prompt, the same
    for the same question.
    """

    how: RowOptions
    prefix: str
    store: RowStore = field(default_factory=RowStore)
    names: dict[str, None] = field(default_factory=dict)
    sizes: array[int] = field(default_factory=lambda: array("I"))
    digest: bytearray = field(default_factory=bytearray)
    sources: set[str] = field(default_factory=set)

    def row(self, index: int) -> Row:
        """A row with every column, as in a table: None where it has none."""
        place, prompt, values, source = self.store[index]
        columns = {**dict.fromkeys(self.names), **values}
        content = content_of(prompt, columns, self.how, place)
        return Row(self.prefix + place, content, columns, source)

    def digests(self) -> np.ndarray:
        return np.frombuffer(bytes(self.digest), dtype="S16")


def _held_out(rows: _Table, fraction: float, data: str) -> np.ndarray:
    """Which rows are for evaluation: those whose prompt has one of the lowest digests."""
    different, ranks = np.unique(rows.digests(), return_inverse=True)
    if len(different) < 2:
        raise TaskError(
            f"{data} has one prompt only: nothing to hold out; add rows or set task.eval_data"
        )
    return ranks < min(math.ceil(fraction * len(different)), len(different) - 1)


def _leaked(rows: _Table, eval_rows: _Table) -> np.ndarray:
    """Which rows have a prompt that is held out; the number of them is logged."""
    leaked = np.isin(rows.digests(), eval_rows.digests())
    if leaked.any():
        logger.warning(
            "%d of %d rows of task.data have a prompt of task.eval_data: they are left out of "
            "training",
            leaked.sum(),
            len(leaked),
        )
    if leaked.all():
        raise TaskError("task.eval_data has every prompt of task.data: nothing to train on")
    return leaked


def _read(location: str, key: str, prefix: str, split: str, how: RowOptions) -> _Table:
    """Every row of a location, checked."""
    left_out = {ours for ours, theirs in how.columns.items() if theirs is None}
    table = _Table(how, prefix)
    reader: RowReader | None = None
    records = read_records(location, key, split, left_out)
    for record in records:
        if reader is None:
            reader = RowReader(record, how)
        place = record.id
        try:
            prompt, values, source = reader.read(record)
            content = content_of(prompt, values, how, record.where)
        except TaskError:
            reader.require_names(key, records)
            raise
        for name in values:
            table.names.setdefault(name)
        table.sizes.append(byte_length(content))
        table.digest += prompt_digest(_question(prompt, values, how))
        if source is not None:
            table.sources.add(source)
        try:
            table.store.append([place, prompt, values, source])
        except (ValueError, RecursionError) as error:
            raise TaskError(_unwritable(record, prompt, values, error)) from error
        except OSError as error:
            raise TaskError(
                f"{key}: its rows do not fit into the folder for temporary files: {error}; set "
                "TMPDIR to a folder with more space"
            ) from error
    assert reader is not None  # read_records raises where there are no rows
    reader.finish(key, len(table.store))
    return table


def _question(
    prompt: str | Messages | None, values: Mapping[str, object], how: RowOptions
) -> str | Messages:
    """What tells one question from another, however it is asked."""
    if prompt is not None:
        return prompt
    return " ".join(f"{name}={values.get(name)}" for name in sorted(how.fields))


def _unwritable(
    record: Record, prompt: str | Messages | None, values: Mapping[str, object], error: Exception
) -> str:
    for name, value in {"prompt": prompt, **values}.items():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as found:
            half = ascii(found.object[found.start])
            way_out = (
                ""
                if name == "prompt"
                else f"; to leave it out: task.options.columns: {{{name}: null}}"
            )
            return (
                f"{record.where}: the column '{name}' holds half a surrogate ({half}), which is no "
                f"text{way_out}"
            )
        except RecursionError:
            return f"{record.where}: the column '{name}' is nested too deeply"
    return f"{record.where}: {error}"
