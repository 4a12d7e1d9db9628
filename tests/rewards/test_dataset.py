"""The dataset task: kinds of files, layouts, columns, prompts."""

from __future__ import annotations

import datetime
import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cohort.rewards.arrow import plain
from cohort.rewards.config import TaskConfig
from cohort.rewards.readers import read_records
from cohort.rewards.tasks import Demonstrates, Row, Task, TaskError, load_task


def make(data: Any, eval_data: Any = None, **options: Any) -> Task:
    given = None if eval_data is None else str(eval_data)
    config = TaskConfig(name="dataset", data=str(data), eval_data=given, options=options)
    return load_task(config, 0)


def rows_of(task: Task) -> list[Row]:
    rows = [task.train_row(i) for i in range(task.train_size())]
    rows += [task.eval_row(i) for i in range(task.eval_size())]
    return sorted(rows, key=lambda row: row.id)


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    table = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    pyarrow.parquet.write_table(table.Table.from_pylist(rows), path)
    return path


QA = [{"prompt": f"Q{n}", "answer": n} for n in range(3)]


def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path) -> None:
    text = "".join(json.dumps(row) + "\n" for row in QA)
    (tmp_path / "a.json").write_text(json.dumps(QA))
    (tmp_path / "b.json").write_text(text)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    files = [parquet(tmp_path / "d.parquet", QA), *sorted(tmp_path.glob("[abc].*"))]
    for file in files:
        got = [(row.content, row.columns) for row in rows_of(make(file))]
        assert got == [(row["prompt"], {"answer": row["answer"]}) for row in QA], file


def test_a_list_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {"prompt": "é" * (n % 7) + f'] , [ " {n}', "answer": [n, {"x": None}]} for n in range(40)
    ]
    for indent in (None, 3):
        (tmp_path / "a.json").write_text(json.dumps(rows, indent=indent))
        for size in (1, 2, 7, 64, 10_000):
            monkeypatch.setattr("cohort.rewards.text_files.JSON_CHARACTERS", size)
            read = list(read_records(str(tmp_path / "a.json"), "task.data", "train"))
            assert [record.values for record in read] == rows
            assert [record.place for record in read] == [f"row{n}" for n in range(1, 41)]


def test_csv_has_texts_quotes_and_physical_line_numbers(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text('\ufeffprompt,answer\n"a, ""b""\nc",007\nd,\n')
    assert [(r.id, r.content, r.columns["answer"]) for r in rows_of(make(file))] == [
        ("line3", 'a, "b"\nc', "007"),
        ("line4", "d", ""),
    ]
    file.write_text("prompt,answer\na,1\nb\n")
    with pytest.raises(TaskError, match=r"a\.csv:3: 1 fields, and 2 columns"):
        make(file)
    file.write_text("prompt,prompt\na,1\n")
    with pytest.raises(TaskError, match="a name of its own"):
        make(file)


def test_a_glob_reads_files_in_order_of_their_names(tmp_path: Path) -> None:
    lines(tmp_path / "b.jsonl", [{"prompt": "B"}])
    lines(tmp_path / "a.jsonl", [{"prompt": "A"}, {"prompt": "C"}])
    ids = [row.id for row in rows_of(make(tmp_path / "*.jsonl"))]
    assert ids == ["a.jsonl:line1", "a.jsonl:line2", "b.jsonl:line1"]
    with pytest.raises(TaskError, match="no file matches"):
        make(tmp_path / "*.csv")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl.gz", b"no gzip", "cannot be read"),
        ("a.parquet", b"PAR1 no", "cannot be read as parquet"),
        ("a.txt", b"x", "of no known kind"),
        ("a.json", b'[{"prompt": 1', "not a list in JSON"),
        ("a.json", b"[3]", "a row must be an object"),
        ("a.json", b'[{"prompt": "A"} {"prompt": "B"}]', r"Expecting ',' delimiter \(in row 2\)"),
        ("a.json", b'[{"prompt": "A"},]', r"not a list in JSON.*\(in row 2\)"),
        ("a.json", b'[,{"prompt": "A"}]', r"not a list in JSON.*\(in row 1\)"),
        ("a.json", b'[{"prompt": "A"}, {"prompt": "B"}', r"not a list in JSON.*\(in row 2\)"),
        ("a.json", b'[{"prompt": "A"}] x', "Extra data"),
        ("a.json", b"[]", "has no rows"),
        ("a.json", b'[{"prompt": ' + b"[" * 100_000, "not a list in JSON"),
        ("a.jsonl", b"[" * 100_000, "not a line of JSON"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TaskError, match=words):
        make(tmp_path / name)


VERL = [
    {
        "data_source": "lighteval/MATH",
        "prompt": [{"role": "user", "content": f"Q{n}"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": str(n)},
        "extra_info": {"index": n, "split": "train", "tests": [1, 2]},
    }
    for n in range(3)
]


def test_verl_parquet(tmp_path: Path) -> None:
    row = rows_of(make(parquet(tmp_path / "a.parquet", VERL)))[1]
    assert row.source == "lighteval/MATH"
    assert row.content == [{"role": "user", "content": "Q1"}]
    assert row.columns["answer"] == row.columns["ground_truth"] == "1"
    assert row.columns["extra_info"] == {"index": 1, "split": "train", "tests": [1, 2]}
    assert json.loads(json.dumps(row.columns)) == row.columns


def test_keys_that_a_table_adds_to_messages_are_left_out(tmp_path: Path) -> None:
    """A template takes a key for its value: `tool_calls` for calls, whatever it holds."""
    arguments = {"function": {"name": "add", "arguments": {"a": 1}}}
    called: list[dict[str, Any]] = [
        {"role": "user", "content": "Q1"},
        {"role": "assistant", "content": None, "tool_calls": [arguments]},
        {"role": "tool", "content": "3", "name": "add"},
        {"role": "assistant", "content": "3", "tool_calls": []},
        {"role": "user", "content": "Q2"},
    ]
    other = {"function": {"name": "find", "arguments": {"name": "x"}}}
    found = [{"role": "assistant", "tool_calls": [other]}, {"role": "user", "content": "Q3"}]
    rows = [{"prompt": [{"role": "user", "content": "Q"}]}, {"prompt": called}, {"prompt": found}]
    read = [row.content for row in rows_of(make(parquet(tmp_path / "a.parquet", rows)))]
    del called[3]["tool_calls"]
    called[1]["content"] = ""
    assert read == [rows[0]["prompt"], called, [{**found[0], "content": ""}, found[1]]]
    last = [{"role": "user", "content": "Q1"}, called[1] | {"content": None}]
    with pytest.raises(TaskError, match="no text under 'content'"):
        make(lines(tmp_path / "a.jsonl", [{"prompt": last}]))
    deep = '{"prompt": [{"role": "user", "content": "Q", "x": ' + "[" * 700 + "]" * 700 + "}]}"
    (tmp_path / "a.jsonl").write_text(deep)
    with pytest.raises(TaskError, match="nested too deeply"):
        make(tmp_path / "a.jsonl")


def test_skyrl_and_openrlhf_layouts(tmp_path: Path) -> None:
    sky = [
        {"prompt": row["prompt"], "env_class": "gsm8k", "reward_spec": {"ground_truth": "7"}}
        for row in VERL
    ]
    assert rows_of(make(parquet(tmp_path / "a.parquet", sky)))[0].columns["answer"] == "7"
    data = lines(
        tmp_path / "a.jsonl", [{"input": "Q1", "label": "1"}, {"input": "Q2", "label": "2"}]
    )
    row = rows_of(make(data, layout="openrlhf"))[0]
    assert (row.content, row.columns) == ("Q1", {"answer": "1", "label": "1"})
    with pytest.raises(TaskError, match=r"no row of task.data has 'reward_model.ground_truth'"):
        make(data, layout="verl")


def test_columns_are_renamed_reached_into_and_left_out(tmp_path: Path) -> None:
    data = lines(
        tmp_path / "a.jsonl",
        [{"q": f"Q{n}", "meta": {"gold": n}, "junk": "x", "completions": 1} for n in range(2)],
    )
    columns = {"prompt": "q", "answer": "meta.gold", "junk": None, "seen": "completions"}
    row = rows_of(make(data, columns=columns))[0]
    assert row.columns == {"meta": {"gold": 0}, "answer": 0, "seen": 1}
    with pytest.raises(TaskError, match=r"has 'qq'.*the columns are q, meta"):
        make(data, columns={"prompt": "qq"})
    with pytest.raises(TaskError, match="rename the column 'completions'"):
        make(data, columns={"prompt": "q"})


def test_values_become_plain() -> None:
    value = {"a": np.array([[1.5, float("nan")]]), 3: np.int64(2), "d": datetime.date(2020, 1, 2)}
    assert plain(value) == {"a": [[1.5, None]], "3": 2, "d": "2020-01-02"}
    with pytest.raises(TypeError, match="a bytes"):
        plain([b"x"])


def test_bytes_in_a_column_name_the_way_out(tmp_path: Path) -> None:
    data = parquet(tmp_path / "a.parquet", [{"prompt": "A", "image": b"x"}] * 2)
    with pytest.raises(TaskError, match=r"'image' holds a bytes.*columns: \{image: null\}"):
        make(data)


UNREADABLE: dict[str, Any] = {
    "a date after 9999": lambda pa: pa.array([1, 10**7], pa.int32()).cast(pa.date32()),
    "a time before 1": lambda pa: pa.array([1, -(2**62)], pa.timestamp("us")),
    "no UTF-8": lambda pa: pa.array([b"a", b"caf\xe9"]).view(pa.string()),
    "no UTF-8, in a list": lambda pa: pa.ListArray.from_arrays(
        [0, 1, 2], pa.array([b"a", b"\xff"]).view(pa.string())
    ),
    "a time zone": lambda pa: pa.array([None, 2], pa.timestamp("us", tz="Mars/X")),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_a_value_that_python_cannot_hold_is_named(tmp_path: Path, what: str) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    file = tmp_path / "a.parquet"
    table = pa.table({"prompt": ["A", "B"], "x": UNREADABLE[what](pa)})
    pyarrow.parquet.write_table(table, file)
    with pytest.raises(TaskError, match=r"a\.parquet:2: the column 'x' .*columns: \{x: null\}"):
        make(file)
    assert [row.columns for row in rows_of(make(file, columns={"x": None}))] == [{}, {}]


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet

    file = tmp_path / "a.parquet"
    table = pa.Table.from_arrays([pa.array(["A", "B"])] * 3, names=["prompt", "x", "x"])
    pyarrow.parquet.write_table(table, file)
    with pytest.raises(TaskError, match="a name of its own: 'x'"):
        make(file)


def test_chat_system_template_and_answer_after(tmp_path: Path) -> None:
    rows = [{"prompt": f"{{x}} {n}", "answer": f"a #### b\n#### {n} "} for n in range(12)]
    data = lines(tmp_path / "a.jsonl", rows)
    plain_task = make(data)
    task = make(
        data, chat=True, system="Be brief.", template="{prompt} \\boxed{{}}", answer_after="####"
    )
    row = task.train_row(0)
    number = int(row.id.removeprefix("line")) - 1
    assert row.columns == {"answer": str(number)}
    assert row.content == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": f"{{x}} {number} \\boxed{{}}"},
    ]
    # What is held out does not depend on how it is asked.
    ids = [[t.eval_row(i).id for i in range(t.eval_size())] for t in (plain_task, task)]
    assert ids[0] == ids[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"template": "no place"}, r"must have \{prompt\}"),
        ({"template": "{prompt} \\boxed{}"}, "double the braces"),
        ({"template": "{prompt.__class__}"}, "not the name of a column"),
        ({"template": "{prompt!r}"}, "not the name of a column"),
        ({"template": "{prompt"}, "task.options.template"),
        ({"template": "{prompt} {level}"}, r"a\.jsonl:1: task.options.template names 'level'"),
        ({"system": "S"}, "task.options.chat=true"),
        ({"answer_after": "####"}, r"a\.jsonl:1: no '####' in 'answer'"),
        ({"answer_after": ""}, "answer_after must be a text, not ''"),
        ({"answer_after": 5}, "answer_after must be a text, not 5"),
        ({"system": 5, "chat": True}, "system must be a text, not 5"),
        ({"chat": "no"}, "chat must be true or false, got 'no'"),
        ({"json_texts": "false"}, "json_texts must be true or false"),
        ({"demonstration": ["answer"]}, "no such column"),
        ({"layout": "alpaca"}, "must be one of auto, trl, verl"),
        ({"columns": ["prompt"]}, "must be a mapping"),
        ({"columns": {"prompt": 3}}, "not names of columns"),
        ({"colums": {}}, "unknown option"),
    ],
)
def test_options_that_cannot_work(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(TaskError, match=words):
        make(lines(tmp_path / "a.jsonl", QA), **options)


def test_a_second_system_message_is_refused(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "A"}, {"role": "user", "content": "B"}]
    data = lines(tmp_path / "a.jsonl", [{"prompt": messages}, {"prompt": "Q"}])
    with pytest.raises(TaskError, match=r"a\.jsonl:1: has a system message already"):
        make(data, system="S", chat=True)


def test_a_folder_is_read_as_the_hub_would(tmp_path: Path, monkeypatch: Any) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "set"
    folder.mkdir()
    lines(folder / "train.jsonl", [{"question": f"Q{n}", "answer": [n]} for n in range(4)])
    lines(folder / "test.jsonl", [{"question": "held", "answer": [9]}])
    task = make(folder, folder, columns={"prompt": "question"})
    assert [task.train_row(i).content for i in range(4)] == ["Q0", "Q1", "Q2", "Q3"]
    assert task.eval_row(0) == Row("eval-row1", "held", {"answer": [9]})
    assert make(f"{folder}?split=train", columns={"prompt": "question"}).train_size() == 3
    with pytest.raises(TaskError, match=r"after '\?' come config, split, revision"):
        make(f"{folder}?splits=train")
    with pytest.raises(TaskError, match="cannot be loaded"):
        make(f"{folder}?split=validation")


def test_a_column_can_hold_demonstrations(tmp_path: Path) -> None:
    rows = [{"prompt": f"Q{n}", "solution": f"It is {n}." if n else None} for n in range(4)]
    file = lines(tmp_path / "a.jsonl", rows)
    task = make(file, demonstration="solution")
    assert isinstance(task, Demonstrates)
    shown = [task.demonstration(row, 0) for row in rows_of(task)]
    assert shown == [None, "It is 1.", "It is 2.", "It is 3."]
    silent = make(file)
    assert isinstance(silent, Demonstrates)
    assert [silent.demonstration(row, 0) for row in rows_of(silent)] == [None] * 4
    with pytest.raises(TaskError, match="it has solution"):
        make(file, demonstration="answer")


def test_a_demonstration_is_what_the_column_holds(tmp_path: Path) -> None:
    """The replies of an episode stay a list; what is neither text nor number is refused later."""
    held = [["first", "second"], 4, 2.5, {"text": "no"}]
    file = lines(
        tmp_path / "a.jsonl", [{"prompt": f"Q{n}", "shown": x} for n, x in enumerate(held)]
    )
    task = make(file, demonstration="shown")
    assert isinstance(task, Demonstrates)
    shown = [task.demonstration(row, 0) for row in rows_of(task)]
    assert shown == [["first", "second"], "4", "2.5", {"text": "no"}]
