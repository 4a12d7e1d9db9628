"""Tasks, their splits, the order of prompts and their rendering."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from cohort.actors.records import Prompt
from cohort.rewards.base import load_function
from cohort.rewards.config import RewardFunctionConfig, RewardsConfig, TaskConfig
from cohort.rewards.specs import reward_specs
from cohort.rewards.tasks import (
    PromptRenderer,
    Row,
    Task,
    TaskError,
    load_task,
    sample_prompts,
    sample_rows,
    split_overlong,
)


def make_task(name: str = "addition", seed: int = 0, **fields: Any) -> Task:
    return load_task(TaskConfig(name=name, **fields), seed)


def split_ids(task: Task) -> tuple[list[str], list[str]]:
    train = [task.train_row(index).id for index in range(task.train_size())]
    return train, [task.eval_row(index).id for index in range(task.eval_size())]


def write_rows(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# addition


def test_addition_covers_all_pairs_once_and_holds_some_out() -> None:
    train, held_out = split_ids(make_task())
    every = {f"{a}+{b}" for a in range(1, 10) for b in range(1, 10)}
    assert len(train) + len(held_out) == 81
    assert set(train) | set(held_out) == every
    assert 14 <= len(held_out) <= 18
    mirrored = {"+".join(reversed(pair.split("+"))) for pair in held_out}
    assert mirrored == set(held_out)


def test_addition_rows_are_questions_with_answers() -> None:
    task = make_task()
    for index in range(task.train_size()):
        row = task.train_row(index)
        a, b = (int(part) for part in row.id.split("+"))
        text = f"What is {a} + {b}? Reply with the number only."
        assert row == Row(f"{a}+{b}", [{"role": "user", "content": text}], {"answer": a + b})


def test_addition_split_depends_on_the_seed_only() -> None:
    assert split_ids(make_task(seed=1)) == split_ids(make_task(seed=1))
    assert split_ids(make_task(seed=1)) != split_ids(make_task(seed=2))


def test_addition_options() -> None:
    train, held_out = split_ids(make_task(options={"min_operand": 10, "max_operand": 12}))
    operands = {int(part) for pair in train + held_out for part in pair.split("+")}
    assert operands == {10, 11, 12}
    assert len(train) + len(held_out) == 9


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"max_operands": 9},
            "task.options.max_operands: unknown option.*max_operand, min_operand",
        ),
        ({"max_operand": "9"}, "max_operand must be a whole number"),
        ({"max_operand": 5000}, "max_operand must be a whole number 0-999"),
        ({"min_operand": 9}, "must be less than"),
        ({"seed": 3}, "task.options.seed: unknown option"),
    ],
)
def test_addition_bad_options(options: dict[str, Any], words: str) -> None:
    with pytest.raises(TaskError, match=words):
        make_task(options=options)


# dataset: jsonl files


def test_jsonl_rows_keep_their_columns_and_line_numbers(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    data = tmp_path / "rows.jsonl"
    data.write_bytes(
        b'\xef\xbb\xbf{"prompt": "One?", "answer": 1}\n\n'
        + json.dumps({"prompt": messages, "level": "hard"}).encode()
        + '\n{"prompt": "line\u2028separator"}\n'.encode()
    )
    task = make_task("dataset", data=str(data), options={"eval_share": 0.01})
    rows = [task.train_row(index) for index in range(task.train_size())]
    rows += [task.eval_row(index) for index in range(task.eval_size())]
    assert sorted(rows, key=lambda row: row.id) == [
        Row("line1", "One?", {"answer": 1, "level": None}),
        Row("line3", messages, {"answer": None, "level": "hard"}),
        Row("line4", "line\u2028separator", {"answer": None, "level": None}),
    ]


def test_jsonl_split_keeps_equal_prompts_together_whatever_the_order(tmp_path: Path) -> None:
    rows = [{"prompt": f"Q{number % 50}", "answer": number} for number in range(200)]
    forward = make_task("dataset", data=write_rows(tmp_path / "a.jsonl", rows), seed=1)
    backward = make_task("dataset", data=write_rows(tmp_path / "b.jsonl", rows[::-1]), seed=2)

    def prompts(task: Task) -> tuple[set[Any], set[Any]]:
        return (
            {task.train_row(index).content for index in range(task.train_size())},
            {task.eval_row(index).content for index in range(task.eval_size())},
        )

    train, held_out = prompts(forward)
    assert not train & held_out
    assert len(held_out) == 5
    assert forward.train_size() + forward.eval_size() == 200
    assert prompts(backward) == (train, held_out)


def test_jsonl_eval_data(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "a.jsonl", [{"prompt": "A"}, {"prompt": "B"}])
    eval_data = write_rows(tmp_path / "b.jsonl", [{"prompt": "C"}])
    task = make_task("dataset", data=data, eval_data=eval_data)
    assert split_ids(task) == (["line1", "line2"], ["eval-line1"])


def test_rows_with_a_held_out_prompt_are_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = write_rows(
        tmp_path / "a.jsonl", [{"prompt": "A  b"}, {"prompt": "B"}, {"prompt": "A b"}]
    )
    eval_data = write_rows(tmp_path / "b.jsonl", [{"prompt": "A b\n"}])
    task = make_task("dataset", data=data, eval_data=eval_data)
    assert split_ids(task) == (["line2"], ["eval-line1"])
    assert "2 of 3 rows of task.data have a prompt of task.eval_data" in caplog.text
    with pytest.raises(TaskError, match="nothing to train on"):
        make_task("dataset", data=data, eval_data=data)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"{", "not a line of JSON"),
        (b"\xff\xfe", "not a line of JSON"),
        (b"[1]", "a row must be an object, not a list"),
        (b'{"question": "Q"}', "no 'prompt' in the row; it has question"),
        (b'{"prompt": ""}', "'prompt' is empty"),
        (b'{"prompt": 3}', "a string or a list of messages, not a int"),
        (b'{"prompt": []}', "an empty list"),
        (b'{"prompt": ["Q"]}', "must have role and content, not be a str"),
        (b'{"prompt": [{"role": "user"}]}', "no text under 'content'"),
        (b'{"prompt": "Q", "completions": 1}', "rename the column 'completions'"),
    ],
)
def test_jsonl_bad_row_names_file_and_line(tmp_path: Path, line: bytes, words: str) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_bytes(b'{"prompt": "Q"}\n' + line + b"\n")
    with pytest.raises(TaskError) as raised:
        make_task("dataset", data=str(data))
    assert f"{data}:2: " in str(raised.value)
    assert words in str(raised.value)


def test_jsonl_files_that_do_not_do(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"task.data: no file at /no/such/rows.jsonl"):
        make_task("dataset", data="/no/such/rows.jsonl")
    with pytest.raises(TaskError, match=r"task.data: required"):
        make_task("dataset")
    with pytest.raises(TaskError, match="has no rows"):
        make_task("dataset", data=write_rows(tmp_path / "a.jsonl", []))
    one = write_rows(tmp_path / "b.jsonl", [{"prompt": "A"}] * 3)
    with pytest.raises(TaskError, match="one prompt only"):
        make_task("dataset", data=one)
    with pytest.raises(TaskError, match=r"task\.eval_data: no file"):
        make_task("dataset", data=one, eval_data="/no/such/rows.jsonl")
    with pytest.raises(TaskError, match="eval_share must be between 0 and 1"):
        make_task("dataset", data=one, options={"eval_share": 2})


# a task of one's own

OWN_TASK = """
from cohort.rewards.config import RewardFunctionConfig
from cohort.rewards.tasks import Row

class Own:
    rewards = (RewardFunctionConfig(path="cohort.rewards.format:number_only"),)
    def __init__(self, seed, size, start=0):
        if size > 100:
            raise KeyError("too many")
        self.size, self.start = size, start
    def train_size(self): return self.size
    def train_row(self, index): return Row(str(index), f"{self.start + index} + 1 =", {})
    def eval_size(self): return 1
    def eval_row(self, index): return Row("e", "5 + 1 =", {})

class Half:
    def __init__(self, seed): pass
    rewards = ()
    def train_size(self): return 1

def function(seed): pass
"""


def test_own_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_task.py").write_text(OWN_TASK)
    monkeypatch.chdir(tmp_path)
    task = make_task("own_task.py:Own", options={"size": 3, "start": 5})
    assert task.train_row(1) == Row("1", "6 + 1 =", {})
    with pytest.raises(TaskError, match=r"task.options.size: required"):
        make_task("own_task.py:Own")
    with pytest.raises(TaskError, match=r"task.options.sise: unknown option.*it has size, start"):
        make_task("own_task.py:Own", options={"sise": 3})
    with pytest.raises(TaskError, match=r"(?s)Own failed.*too many"):
        make_task("own_task.py:Own", options={"size": 101})
    with pytest.raises(TaskError, match="no training rows"):
        make_task("own_task.py:Own", options={"size": 0})
    with pytest.raises(TaskError, match="Half has no train_row, eval_size, eval_row"):
        make_task("own_task.py:Half")
    with pytest.raises(TaskError, match="is not a class"):
        make_task("own_task.py:function")
    with pytest.raises(TaskError, match="did you mean Own"):
        make_task("own_task.py:Owl")


def test_unknown_task_names_the_nearest() -> None:
    with pytest.raises(TaskError, match=r"unknown task; did you mean addition\? \(built in: add"):
        make_task("additon")


# which functions score


def test_the_tasks_own_reward_scores_its_rows() -> None:
    (spec,) = reward_specs(make_task(), RewardsConfig())
    assert (spec.name, spec.path, spec.weight) == (
        "exact_number",
        "cohort.rewards.answer:exact_number",
        1.0,
    )
    assert load_function(spec.path)([""], ["7"], [7]) == [1.0]


def test_reward_specs_of_the_config(tmp_path: Path) -> None:
    config = RewardsConfig(
        functions=[
            "a:f",
            RewardFunctionConfig(path="b:f", weight=0.5),
            "c:f_2",
            "sub/d.py:f",
        ]
    )
    specs = reward_specs(make_task(), config, tmp_path)
    assert [(spec.name, spec.path, spec.weight) for spec in specs] == [
        ("f", "a:f", 1.0),
        ("f_2", "b:f", 0.5),
        ("f_2_2", "c:f_2", 1.0),
        ("f_3", f"{tmp_path}/sub/d.py:f", 1.0),
    ]


def test_reward_specs_without_a_function_that_counts(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "a.jsonl", [{"prompt": "A"}, {"prompt": "B"}])
    with pytest.raises(TaskError, match=r"no reward function: set rewards\.functions"):
        reward_specs(make_task("dataset", data=data), RewardsConfig())
    with pytest.raises(TaskError, match="empty list"):
        reward_specs(make_task(), RewardsConfig(functions=[]))
    watched = RewardsConfig(functions=[RewardFunctionConfig(path="a:f", weight=0)])
    with pytest.raises(TaskError, match="every reward function has weight 0"):
        reward_specs(make_task(), watched)


# order


def test_every_row_once_in_an_epoch_in_another_order_each_time() -> None:
    task = make_task()
    size = task.train_size()
    rows = sample_rows(task, 0, 0, 3 * size)
    orders = []
    for epoch in range(3):
        part = rows[epoch * size : (epoch + 1) * size]
        assert {number for number, _ in part} == {epoch}
        assert sorted(row.id for _, row in part) == sorted(split_ids(task)[0])
        orders.append([row.id for _, row in part])
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert [row.id for _, row in sample_rows(task, 1, 0, size)] != orders[0]


@pytest.mark.parametrize("chunk", [1, 8, 61, 100])
def test_rows_are_the_same_however_they_are_asked_for(chunk: int) -> None:
    whole = sample_rows(make_task(), 5, 0, 200)
    parts = []
    for cursor in range(0, 200, chunk):
        # A new task each time: as after a restart.
        parts += sample_rows(make_task(), 5, cursor, min(chunk, 200 - cursor))
    assert parts == whole


def test_the_order_is_pinned() -> None:
    # A change here would break resuming runs of earlier versions.
    ids = [row.id for _, row in sample_rows(make_task(), 0, 0, 4)]
    assert ids == ["7+6", "6+7", "4+1", "4+7"]


# rendering

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] not in ['user', 'system'] %}{{ raise_exception('who is that') }}{% endif %}"
    "<{{ m['role'] }}> {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Words to ids; adds <s> to plain texts, as Llama's does, and has it in the template too."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "<user>", "<system>", "<assistant>", "one", "two", "three"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        unk_token="<unk>",
        extra_special_tokens=["<user>", "<system>", "<assistant>"],
        chat_template=CHAT_TEMPLATE,
    )


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_messages_are_rendered_once_with_one_bos(tokenizer: Any) -> None:
    row = Row("r7", user("one two"), {"answer": 3})
    prompt = PromptRenderer(tokenizer, 64).render(row, 2, 120)
    assert prompt == Prompt("2-r7", (1, 2, 5, 6, 4), user("one two"), {"answer": 3}, 2)
    assert prompt.text == "<s> <user> one two <assistant>"


@pytest.mark.parametrize("text", ["one two", "<s> one two", "<s>one two"])
def test_plain_text_gets_one_bos(tokenizer: Any, text: str) -> None:
    prompt = PromptRenderer(tokenizer, 64).render(Row("r", text), 0, 0)
    assert prompt.token_ids == (1, 5, 6)
    assert prompt.content == text


def test_messages_without_a_chat_template(tokenizer: Any) -> None:
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    renderer = PromptRenderer(bare, 64)
    assert renderer.render(Row("r", "one"), 0, 0).token_ids == (1, 5)
    with pytest.raises(TaskError, match=r"row r .*no chat template; use prompts that are plain"):
        renderer.render(Row("r", user("one")), 0, 0)


def test_a_template_that_refuses_the_messages(tokenizer: Any) -> None:
    row = Row("r", [{"role": "wizard", "content": "one"}])
    with pytest.raises(TaskError, match=r"row r .*chat template failed: who is that"):
        PromptRenderer(tokenizer, 64).render(row, 0, 0)


def test_split_overlong() -> None:
    prompts = [Prompt(str(n), (1,) * n, "") for n in (3, 1, 2, 4)]
    fitting, overlong = split_overlong(prompts, 2)
    assert [prompt.id for prompt in fitting] == ["1", "2"]
    assert [prompt.id for prompt in overlong] == ["3", "4"]
    assert split_overlong(prompts, None) == (prompts, [])


class Lengths:
    """Prompts of the given numbers of words."""

    rewards: tuple[RewardFunctionConfig, ...] = ()

    def __init__(self, *words: int) -> None:
        self.words = words

    def train_size(self) -> int:
        return len(self.words)

    def train_row(self, index: int) -> Row:
        return Row(f"r{index}", " ".join(["one"] * self.words[index]))

    def eval_size(self) -> int:
        return 0

    def eval_row(self, index: int) -> Row:
        raise IndexError(index)


def test_overlong_prompts_are_skipped_and_counted_also_after_a_resume(tokenizer: Any) -> None:
    task, renderer = Lengths(1, 9, 2, 9, 3), PromptRenderer(tokenizer, 5)
    first = sample_prompts(task, renderer, 0, 0, 4)
    second = sample_prompts(task, renderer, 0, first.cursor, 4)
    both = sample_prompts(task, renderer, 0, 0, 8)
    assert len(first.prompts) == len(second.prompts) == 4
    assert first.prompts + second.prompts == both.prompts
    assert both.cursor == second.cursor == len(both.prompts) + len(both.overlong)
    ids = [prompt.id for prompt in both.prompts + both.overlong]
    assert len(ids) == len(set(ids))
    assert {prompt.id.split("-")[1] for prompt in both.overlong} <= {"r1", "r3"}


def test_prompts_that_are_all_overlong_are_an_error(tokenizer: Any) -> None:
    words = r"all 3 prompts are longer than 5 tokens \(the shortest has 8\)"
    with pytest.raises(TaskError, match=words):
        sample_prompts(Lengths(7, 8, 9), PromptRenderer(tokenizer, 5), 0, 0, 2)
