"""Data as people have it, damaged or half converted: it loads, or is refused in words."""

from __future__ import annotations

import bz2
import csv
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cohort.rewards.tasks import Demonstrates, TaskError
from tests.rewards.test_dataset import QA, VERL, lines, make, parquet, rows_of

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Café?"}]
SOLVED = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "It is 4."}]


def contents(data: Any, **options: Any) -> list[Any]:
    return [row.content for row in rows_of(make(data, **options))]


def table(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


# Columns that are JSON as text --------------------------------------------------------------------


@pytest.mark.parametrize("form", [json.dumps, str], ids=["json", "python"])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_verl_rows_whose_columns_are_text(tmp_path: Path, kind: str, form: Any) -> None:
    nested = ("prompt", "reward_model", "extra_info")
    rows = [{**row, **{name: form(row[name]) for name in nested}} for row in VERL]
    write = {"csv": table, "jsonl": lines, "parquet": parquet}[kind]
    for row, given in zip(rows_of(make(write(tmp_path / f"a.{kind}", rows))), VERL, strict=True):
        assert row.content == given["prompt"]
        assert row.source == "lighteval/MATH"
        assert row.columns["reward_model"] == given["reward_model"]
        assert row.columns["extra_info"] == given["extra_info"]
        assert row.columns["answer"] == given["reward_model"]["ground_truth"]


def test_only_text_that_is_json_is_read(tmp_path: Path) -> None:
    text = '{"role": "admin"} is JSON. Is it valid?'
    rows = [{"prompt": text, "answer": "[1]", "tests": "{x for x in y}", "note": "{a: 1}"}] * 2
    rows += [{"prompt": "Q", "answer": "{}", "tests": '[{"in": 1}]', "note": "x"}]
    got = rows_of(make(lines(tmp_path / "a.jsonl", rows)))
    assert got[0].content == text
    assert got[0].columns == {"answer": "[1]", "tests": "{x for x in y}", "note": "{a: 1}"}
    assert got[2].columns == {"answer": "{}", "tests": [{"in": 1}], "note": "x"}


@pytest.mark.parametrize(
    "text",
    [
        '[{"id": 1}, {"id": 2}] is a list. How long is it?',
        '{"from": "A", "to": "B", "value": 2} Say this in words.',
        '{"task": "add", "a": 1}',
        '["Who?", "Why?"]',
        "[{1, 2}, {3}]",
        "({'a': 1},)",
        '"Who?"',
        '"[1, 2]"',
        '"',
        "\ufeffWho?",
    ],
)
def test_a_question_that_begins_like_json_stays_a_text(tmp_path: Path, text: str) -> None:
    assert contents(lines(tmp_path / "a.jsonl", [{"prompt": text}] * 2 + QA))[0] == text


WRAPPED = {"twice": json.dumps, "thrice": lambda text: json.dumps(json.dumps(text))}
WRAPPED["byte order"] = lambda text: f"\ufeff {text}"


@pytest.mark.parametrize("how", WRAPPED)
def test_what_programs_put_around_json_is_taken_away(tmp_path: Path, how: str) -> None:
    columns = {**VERL[0], "tests": [{"in": "1"}]}
    names = ("prompt", "reward_model", "tests")
    row = {**columns, **{name: WRAPPED[how](json.dumps(columns[name])) for name in names}}
    read = rows_of(make(lines(tmp_path / "a.jsonl", [row, {**row, "prompt": "Q"}])))[0]
    assert read.content == VERL[0]["prompt"]
    assert {name: read.columns[name] for name in names[1:]} == {
        name: columns[name] for name in names[1:]
    }


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("prompt", json.dumps([{"from": "human", "value": "Q"}])),
        ("prompt", str(np.array([{"from": "human", "value": "Q"}] * 2, dtype=object))),
        ("prompt", repr(np.array([{"content": "Q"}], dtype=object))),
        ("prompt", json.dumps([{"content": "Q"}])),
        ("prompt", json.dumps([{"text": "Q"}])),
        ("prompt", json.dumps({"content": "Q"})),
        ("prompt", json.dumps({"0": {"text": "Q"}})),
        ("prompt", json.dumps({"messages": MESSAGES})),
        ("prompt", str(tuple(MESSAGES))),
        ("prompt", json.dumps(json.dumps([{"from": "human", "value": "Q"}]))),
        ("prompt", json.dumps(MESSAGES)[:-1]),
        ("prompt", json.dumps(MESSAGES)[:-3] + "}"),
        ("reward_model", '{"ground_truth": '),
        ("extra_info", "{'index': array([1])}"),
        ("tests", '[{"input": "1", "output": '),
    ],
)
def test_broken_json_in_a_column_is_named_with_the_way_out(
    tmp_path: Path, name: str, text: str
) -> None:
    data = lines(tmp_path / "a.jsonl", [{"prompt": "A"}, {"prompt": "B", name: text}])
    words = rf"a\.jsonl:2: .*the column '{name}' .*task.options.json_texts=false"
    with pytest.raises(TaskError, match=words):
        make(data)
    row = rows_of(make(data, json_texts=False))[1]
    assert (row.content if name == "prompt" else row.columns[name]) == text


def test_a_dotted_path_reaches_into_a_text(tmp_path: Path) -> None:
    rows = [{"prompt": f"Q{n}", "meta": json.dumps({"gold": n})} for n in range(2)]
    task = make(table(tmp_path / "a.csv", rows), columns={"answer": "meta.gold"})
    assert [row.columns["answer"] for row in rows_of(task)] == [0, 1]


def test_messages_as_text_inside_another_column(tmp_path: Path) -> None:
    rows = [{"meta": {"chat": json.dumps(MESSAGES)}, "cases": '[{"in": 1}]'}]
    file = lines(tmp_path / "a.jsonl", [*rows, {"meta": {"chat": "Q"}}])
    columns = {"prompt": "meta.chat", "tests": "cases"}
    assert contents(file, columns=columns) == [MESSAGES, "Q"]
    assert rows_of(make(file, columns=columns))[0].columns["tests"] == [{"in": 1}]
    assert contents(file, columns=columns, json_texts=False) == [json.dumps(MESSAGES), "Q"]


# A last message of the assistant ------------------------------------------------------------------


def test_a_prompt_that_ends_in_the_assistants_words_is_kept(tmp_path: Path) -> None:
    begun = [MESSAGES[1], {"role": "assistant", "content": "Let me think. <think>"}]
    other = [MESSAGES[0], *begun]
    rows = [{"prompt": begun}, {"prompt": json.dumps(other)}]
    assert contents(lines(tmp_path / "a.jsonl", rows)) == [begun, other]


def test_messages_that_end_in_the_solution_need_a_choice(tmp_path: Path) -> None:
    other = [{"role": "user", "content": "3 + 3?"}, {"role": "assistant", "content": "It is 6."}]
    data = lines(tmp_path / "a.jsonl", [{"messages": SOLVED}, {"messages": other}])
    columns = {"prompt": "messages"}
    with pytest.raises(TaskError) as refused:
        make(data, columns=columns)
    for words in ("a.jsonl:1", "final_assistant=demonstration", "=continue"):
        assert words in str(refused.value)
    assert contents(data, columns=columns, final_assistant="continue") == [SOLVED, other]
    task = make(data, columns=columns, final_assistant="demonstration")
    assert [row.content for row in rows_of(task)] == [SOLVED[:1], other[:1]]
    assert isinstance(task, Demonstrates)
    assert [task.demonstration(row, 0) for row in rows_of(task)] == ["It is 4.", "It is 6."]
    alone = lines(tmp_path / "b.jsonl", [{"prompt": SOLVED[1:]}] * 2)
    with pytest.raises(TaskError, match="nothing but the assistant's message"):
        make(alone, final_assistant="demonstration")
    with pytest.raises(TaskError, match="must be one of auto, continue, demonstration"):
        make(data, final_assistant="drop")


def test_how_an_answer_begins_does_not_move_a_prompt_between_the_splits(tmp_path: Path) -> None:
    asked = [[{"role": "user", "content": f"Q{n}"}] for n in range(20)]
    begun = [[*each, {"role": "assistant", "content": "<think>"}] for each in asked]
    files = (
        lines(tmp_path / f"{n}.jsonl", [{"prompt": p} for p in prompts])
        for n, prompts in enumerate((asked, begun))
    )
    ids = [[t.eval_row(i).id for i in range(t.eval_size())] for t in map(make, files)]
    assert ids[0] == ids[1]


# Rows without a prompt, templates -----------------------------------------------------------------

NUMBERS = [{"nums": [1, 2, n], "target": n + 3} for n in range(3)]


def test_rows_without_a_prompt_are_made_by_a_template(tmp_path: Path) -> None:
    data = parquet(tmp_path / "a.parquet", NUMBERS)
    with pytest.raises(TaskError, match=r"a\.parquet:1: no 'prompt'.*nums, target.*template"):
        make(data)
    task = make(data, template="Make {target} of {nums}.", chat=True)
    row = rows_of(task)[1]
    assert row.content == [{"role": "user", "content": "Make 4 of [1, 2, 1]."}]
    assert row.columns == {"nums": [1, 2, 1], "target": 4}


def test_a_template_is_never_filled_with_nothing(tmp_path: Path) -> None:
    data = lines(tmp_path / "a.jsonl", [*NUMBERS, {"nums": [1], "target": None}])
    with pytest.raises(TaskError, match=r"a\.jsonl:4: .*'target', which is empty"):
        make(data, template="Make {target} of {nums}.")
    data = lines(tmp_path / "b.jsonl", [*NUMBERS, {"nums": [1]}])
    with pytest.raises(TaskError, match=r"b\.jsonl:4: .*names 'target'"):
        make(data, template="Make {target} of {nums}.")


@pytest.mark.parametrize("prompt", [None, "", "  \n", [], 3, [{"role": "user"}], ["x"], {"a": 1}])
def test_prompts_that_are_none_name_their_row(tmp_path: Path, prompt: Any) -> None:
    data = lines(tmp_path / "a.jsonl", [{"prompt": "A"}, {"prompt": prompt}])
    with pytest.raises(TaskError, match=r"a\.jsonl:2: "):
        make(data)


def test_rows_may_differ_in_kind_and_columns(tmp_path: Path) -> None:
    rows = [{"prompt": "A", "answer": 1}, {"prompt": MESSAGES, "answer": "x", "level": [2]}]
    got = rows_of(make(lines(tmp_path / "a.jsonl", rows)))
    assert [row.content for row in got] == ["A", MESSAGES]
    assert [row.columns for row in got] == [
        {"answer": 1, "level": None},
        {"answer": "x", "level": [2]},
    ]


def test_a_name_that_no_row_has_explains_other_errors(tmp_path: Path) -> None:
    data = lines(tmp_path / "a.jsonl", [{"q": "A", "completions": 1}] * 3)
    with pytest.raises(TaskError, match=r"no row of task\.data has 'question'"):
        make(data, columns={"prompt": "question"})
    data = lines(tmp_path / "b.jsonl", [{"q": "A", "completions": 1}, {"question": "B"}])
    with pytest.raises(TaskError, match=r"b\.jsonl:1: rename the column 'completions'"):
        make(data, columns={"prompt": "question"})


@pytest.mark.parametrize("name", ["prompts", "completions"])
def test_columns_with_the_names_of_arguments_are_refused(tmp_path: Path, name: str) -> None:
    data = lines(tmp_path / "a.jsonl", [{"prompt": "A", name: 1}, {"prompt": "B"}])
    with pytest.raises(TaskError, match=rf"a\.jsonl:1: rename the column '{name}'.*columns"):
        make(data)
    assert rows_of(make(data, columns={"other": name}))[0].columns == {"other": 1}


# Files --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_marked_encodings_are_read(tmp_path: Path, kind: str, encoding: str) -> None:
    rows = [{"prompt": "Café?", "answer": "é"}, {"prompt": "Tee?", "answer": "日"}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    text = {"jsonl": text, "json": json.dumps(rows, ensure_ascii=False)}.get(
        kind, "prompt,answer\r\nCafé?,é\r\nTee?,日\r\n"
    )
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    (tmp_path / f"a.{kind}").write_bytes((mark + text).encode(encoding))
    got = rows_of(make(tmp_path / f"a.{kind}"))
    assert [(row.content, row.columns["answer"]) for row in got] == [("Café?", "é"), ("Tee?", "日")]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_latin_1_is_refused_with_its_place(tmp_path: Path, kind: str) -> None:
    text = {
        "jsonl": '{"prompt": "Tee?"}\n{"prompt": "Café?"}\n',
        "json": '[{"prompt": "Tee?"}, {"prompt": "Café?"}]',
        "csv": "prompt\nTee?\nCafé?\n",
    }[kind]
    (tmp_path / f"a.{kind}").write_bytes(text.encode("latin-1"))
    with pytest.raises(TaskError, match=rf"a\.{kind}.*0xe9 is not UTF-8; save the file as UTF-8"):
        make(tmp_path / f"a.{kind}")


def test_packed_files(tmp_path: Path) -> None:
    text = "".join(json.dumps(row) + "\n" for row in QA).encode()
    (tmp_path / "a.jsonl.bz2").write_bytes(bz2.compress(text))
    (tmp_path / "a.jsonl.xz").write_bytes(lzma.compress(text))
    (tmp_path / "a.csv.xz").write_bytes(lzma.compress(b"prompt\nQ0\nQ1\nQ2\n"))
    files = [tmp_path / "a.jsonl.bz2", tmp_path / "a.jsonl.xz", tmp_path / "a.csv.xz"]
    if sys.modules.get("pyarrow") or pytest.importorskip("pyarrow"):
        import pyarrow

        with pyarrow.output_stream(str(tmp_path / "a.jsonl.zst"), compression="zstd") as stream:
            stream.write(text)
        files.append(tmp_path / "a.jsonl.zst")
    for file in files:
        assert contents(file) == ["Q0", "Q1", "Q2"], file
    cut = bz2.compress(text)[:-8]
    (tmp_path / "a.jsonl.bz2").write_bytes(cut)
    with pytest.raises(TaskError, match="cannot be read"):
        make(files[0])


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz"])
def test_empty_files_and_pointers_are_refused(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(b"")
    with pytest.raises(TaskError, match=r"a\.\w+"):
        make(file)
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")
    with pytest.raises(TaskError, match=r"pointer of Git LFS.*git lfs pull"):
        make(file)
    with pytest.raises(TaskError, match="pointer of Git LFS"):
        make(tmp_path)


@pytest.mark.parametrize("where", ["prompt", "messages", "answer", "nested"])
def test_half_a_surrogate_names_its_row_and_column(tmp_path: Path, where: str) -> None:
    half = "a \ud83d b"
    row = {
        "prompt": {"prompt": half},
        "messages": {"prompt": [{"role": "user", "content": half}]},
        "answer": {"prompt": "B", "answer": half},
        "nested": {"prompt": "B", "answer": {"x": [half]}},
    }[where]
    data = lines(tmp_path / "a.jsonl", [{"prompt": "A"}, row])
    column = "prompt" if "answer" not in row else "answer"
    with pytest.raises(TaskError, match=rf"a\.jsonl:2: the column '{column}' holds half a surr"):
        make(data)


def test_numbers_of_parquet_become_plain(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    import decimal

    import pyarrow
    import pyarrow.parquet

    columns = {
        "prompt": ["A", "B"],
        "grid": [np.array([1.5, np.nan]), np.array([])],
        "score": np.array([np.nan, 2.0], dtype=np.float32),
        "count": np.array([1, 2], dtype=np.uint8),
        "price": [decimal.Decimal("1.50"), None],
        "flag": np.array([True, False]),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    first, second = rows_of(make(tmp_path / "a.parquet"))
    assert first.columns == {
        "grid": [1.5, None], "score": None, "count": 1, "price": "1.50", "flag": True,
    }  # fmt: skip
    assert second.columns["score"] == 2.0
    assert second.columns["grid"] == []
    (tmp_path / "b.jsonl").write_text('{"prompt": "A", "x": NaN, "y": -Infinity}\n{"prompt": "B"}')
    first = rows_of(make(tmp_path / "b.jsonl"))[0]
    assert first.columns == {"x": None, "y": float("-inf")}


def test_files_of_the_same_name_have_rows_of_their_own(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        lines(tmp_path / folder / "rows.jsonl", [{"prompt": f"{folder}{n}"} for n in range(3)])
    ids = [row.id for row in rows_of(make(tmp_path / "*" / "rows.jsonl"))]
    assert len(set(ids)) == 6


def test_the_same_prompt_twice_is_on_one_side(tmp_path: Path) -> None:
    rows = [{"prompt": f"Q{n % 10}", "answer": n} for n in range(40)]
    task = make(lines(tmp_path / "a.jsonl", rows))
    train = {task.train_row(i).content for i in range(task.train_size())}
    held = {task.eval_row(i).content for i in range(task.eval_size())}
    assert (len(train), len(held), train & held) == (9, 1, set())
    assert task.train_size() + task.eval_size() == 40


def test_a_folder_is_read_where_there_is_no_home(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    lines(tmp_path / "train.jsonl", [{"prompt": f"Q{n}"} for n in range(4)])
    program = (
        "from cohort.rewards.config import TaskConfig\nfrom cohort.rewards.tasks import load_task\n"
        f"task = load_task(TaskConfig(name='dataset', data={str(tmp_path)!r}), 0)\n"
        "print(task.train_size(), task.eval_size())"
    )
    hidden = ("HF_HOME", "HF_DATASETS_CACHE", "XDG_CACHE_HOME")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    # Not a folder: no user can write there, whatever their rights.
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**env, "HOME": "/dev/null/home", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.split() == ["3", "1"], done.stderr[-2000:]
