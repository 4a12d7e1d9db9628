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
    byte_length,
    content_of,
    filled,
    prompt_digest,
    template_fields,
)
from cohort.rewards.row_reader import (
    FINAL_ASSISTANT,
    LAYOUTS,
    SHOWN,
    Columns,
    RowOptions,
    RowReader,
    asked,
)
from cohort.rewards.row_store import RowStore
from cohort.rewards.survey import Survey
from cohort.rewards.task import Row, TaskError

logger = logging.getLogger(__name__)


class DatasetTask:
    """Rows of `task.data`, and held-out rows of `task.eval_data` or of a share of the prompts.

    Data: a file (.jsonl, .json, .csv, each also as .gz, .zst, .bz2 or .xz; .parquet), a glob of
    files, a folder, or a Hugging Face dataset like `openai/gsm8k?config=main&split=train` (without
    `split`: train, and test for eval_data). A row has `prompt` (a string, or a list of messages
    with `role` and `content`) and any other columns, which the reward functions receive by name; a
    column that a row does not have is None there. Rows are kept on disk, where they are many.

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
        user message; braces of its own are doubled. Rows without a prompt are made of its columns:
        "Use {nums} to make {target}."
    final_assistant: what a last message of the assistant is. continue: the beginning of the answer,
        which the model goes on from. demonstration: an answer, which is taken off the prompt and
        becomes the column `demonstration`. auto: continue where the column is called `prompt`; in
        any other (`messages`) one of the two must be chosen.
    demonstration: the column (ours) with a good answer, from which `cohort warmup` learns.
    json_texts: messages, reward_model, reward_spec, extra_info, tests and columns of a dotted path
        that are text in JSON (as in CSV) are read (true).
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
        final_assistant: str = "auto",
        demonstration: str | None = None,
        json_texts: bool = True,
        eval_share: float = 0.1,
    ) -> None:
        if not isinstance(eval_share, (int, float)) or not 0 < eval_share < 1:
            raise TaskError(f"task.options.eval_share must be between 0 and 1, got {eval_share!r}")
        _check_columns(columns)
        if layout != "auto" and layout not in LAYOUTS:
            raise TaskError(
                f"task.options.layout={layout}: must be one of auto, {', '.join(LAYOUTS)}"
            )
        if final_assistant not in FINAL_ASSISTANT:
            raise TaskError(
                f"task.options.final_assistant={final_assistant}: must be one of "
                f"{', '.join(FINAL_ASSISTANT)}"
            )
        if final_assistant == "demonstration" and demonstration is None:
            demonstration = SHOWN
        self._how = RowOptions(
            columns=columns or {},
            layout=layout,
            answer_after=answer_after,
            chat=chat,
            system=system,
            template=template,
            fields=template_fields(template),
            final_assistant=final_assistant,
            json_texts=json_texts,
        )
        rows = _read(data, "task.data", "", "train", self._how)
        if demonstration is not None and demonstration not in rows.names:
            raise TaskError(
                f"task.options.demonstration={demonstration}: no such column in task.data; it has "
                f"{', '.join(rows.names) or 'none'}"
            )
        self._demonstration = demonstration
        self._rows = self._eval_rows = rows
        if eval_data is not None:
            self._eval_rows = _read(eval_data, "task.eval_data", "eval-", "test", self._how)
            held = set(self._eval_rows.digests())
            kept = [index for index, digest in enumerate(rows.digests()) if digest not in held]
            self._train = array("q", kept)
            self._eval = array("q", range(len(self._eval_rows.store)))
            leaked = len(rows.store) - len(kept)
            if leaked:
                logger.warning(
                    "%d of %d rows of task.data have a prompt of task.eval_data: they are left out "
                    "of training",
                    leaked,
                    len(rows.store),
                )
            if not kept:
                raise TaskError("task.eval_data has every prompt of task.data: nothing to train on")
            return
        ranks, different = rows.ranks()
        if different < 2:
            raise TaskError(
                f"{data} has one prompt only: nothing to hold out; add rows or set task.eval_data"
            )
        held_out = ranks < min(math.ceil(eval_share * different), different - 1)
        self._train = array("q", np.flatnonzero(~held_out).tolist())
        self._eval = array("q", np.flatnonzero(held_out).tolist())

    def train_size(self) -> int:
        return len(self._train)

    def train_row(self, index: int) -> Row:
        return self._rows.row(self._train[index])

    def eval_size(self) -> int:
        return len(self._eval)

    def eval_row(self, index: int) -> Row:
        return self._eval_rows.row(self._eval[index])

    def demonstration(self, row: Row, epoch: int) -> str | None:  # noqa: ARG002
        """The text of the row's column `task.options.demonstration`."""
        if self._demonstration is None:
            return None
        text = row.columns.get(self._demonstration)
        return None if text is None else str(text)

    def survey(self) -> Survey:
        """See `cohort.rewards.survey.Surveys`."""
        train, held_out = (
            np.frombuffer(rows.sizes, dtype=np.uint32)[np.frombuffer(chosen, dtype=np.int64)]
            for rows, chosen in ((self._rows, self._train), (self._eval_rows, self._eval))
        )
        sources = frozenset(self._rows.sources | self._eval_rows.sources)
        return Survey(train.astype(np.int64), held_out.astype(np.int64), sources)

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
        how = self.how
        columns = {**dict.fromkeys(self.names), **values}
        if prompt is None:
            prompt, template = filled(how.template, None, columns, place), None
        else:
            template = how.template
        content = content_of(prompt, columns, template, how.chat, how.system, place)
        return Row(self.prefix + place, content, columns, source)

    def digests(self) -> list[bytes]:
        whole = bytes(self.digest)
        return [whole[start : start + 16] for start in range(0, len(whole), 16)]

    def ranks(self) -> tuple[np.ndarray, int]:
        """The place of each row's prompt among all different ones, by digest, and their number."""
        halves = np.frombuffer(bytes(self.digest), dtype=">u8").reshape(-1, 2)
        order = np.lexsort((halves[:, 1], halves[:, 0]))
        ordered = halves[order]
        new = np.ones(len(ordered), dtype=np.int64)
        new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
        ranks = np.empty(len(ordered), dtype=np.int64)
        ranks[order] = np.cumsum(new) - 1
        return ranks, int(new.sum())


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
            content = asked(prompt, values, how, record)
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


def _question(prompt: Any, values: Mapping[str, Any], how: RowOptions) -> str | Messages:
    """What tells one question from another, however it is asked."""
    if prompt is not None:
        return prompt
    return " ".join(f"{name}={values.get(name)}" for name in sorted(how.fields))


def _unwritable(record: Record, prompt: Any, values: Mapping[str, Any], error: Exception) -> str:
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


def _check_columns(columns: Columns | None) -> None:
    if columns is not None and not isinstance(columns, Mapping):
        raise TaskError(f"task.options.columns must be a mapping of ours: theirs, got {columns!r}")
    for ours, theirs in (columns or {}).items():
        if not isinstance(ours, str) or not (theirs is None or isinstance(theirs, str)):
            raise TaskError(f"task.options.columns: {ours!r}: {theirs!r} are not names of columns")
