"""Large data start without being rendered; what is too long is found at latest when it is drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cohort.cluster.lengths
from cohort.cluster.config import Config
from cohort.cluster.config_file import load_config
from cohort.cluster.evaluation import fitting_rows
from cohort.cluster.lengths import (
    MESSAGE_TOKENS,
    Lengths,
    Rendered,
    check_lengths,
    chosen,
    render_rows,
)
from cohort.cluster.observe.console import Console
from cohort.cluster.prepare import Prepared, RunError, first_probe, make_renderer
from cohort.rewards.config import RewardFunctionConfig, TaskConfig
from cohort.rewards.progress import with_progress
from cohort.rewards.row_store import KEPT_BYTES, RowStore
from cohort.rewards.survey import UNKNOWN, survey_of
from cohort.rewards.tasks import PromptRenderer, Row, Task, TaskError, load_task, sample_prompts
from tests.models import tiny_tokenizer
from tests.templates import FAMILIES, tokenizer_of

ADDITION = Path(__file__).resolve().parents[2] / "deploy" / "configs" / "addition.yaml"
TOKENIZER = tiny_tokenizer()
ROWS = 12_000


def config(*overrides: str) -> Config:
    return load_config(ADDITION, ["model.path=m", "actors.max_tokens=8", *overrides])


class Counting(PromptRenderer):
    """Counts what it renders."""

    count = 0

    def render(self, row: Row, epoch: int, cursor: int = 0) -> Any:
        self.count += 1
        return super().render(row, epoch, cursor)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """ROWS rows of 5 to 9 digits and letters; the last row of 200."""
    file = tmp_path_factory.mktemp("data") / "rows.jsonl"
    texts = [f"{n} + {'x' * (n % 5)}" for n in range(ROWS - 1)] + ["y" * 200]
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return load_task(TaskConfig(name="dataset", data=str(file)), 0)


class Made:
    """A task that knows nothing of its rows before it makes them."""

    rewards = (RewardFunctionConfig(path="cohort.rewards.answer:exact_number"),)

    def __init__(self, size: int) -> None:
        self._size = size

    def train_size(self) -> int:
        return self._size

    def train_row(self, index: int) -> Row:
        return Row(f"t{index}", "x" * (index % 7 + 1), {}, "made")

    def eval_size(self) -> int:
        return 3

    def eval_row(self, index: int) -> Row:
        return Row(f"e{index}", "z", {}, "held")


def test_a_large_task_is_not_rendered_whole_but_its_longest_row_is(large: Task) -> None:
    renderer = Counting(TOKENIZER, 300)
    rendered = render_rows(large, renderer)
    assert renderer.count == len(rendered.prompts) < 2_500
    assert (rendered.rows, rendered.whole) == (ROWS, False)
    longest = max(len(prompt.token_ids) for prompt in rendered.prompts)
    every = [renderer.render(large.train_row(i), 0) for i in range(large.train_size())]
    assert longest >= max(len(prompt.token_ids) for prompt in every)
    # The first ones are there: `cohort check` judges made-up completions of them.
    assert [p.id for p in rendered.train[:4]] == [p.id for p in every[:4]]


def test_a_task_of_usual_size_is_rendered_whole() -> None:
    rendered = render_rows(Made(40), Counting(TOKENIZER, 300))
    assert [len(rendered.train), len(rendered.held_out), rendered.rest] == [40, 3, 0]
    assert rendered.whole
    assert rendered.sources == {"made", "held"}


def test_short_replies_leave_room_for_what_an_environment_says() -> None:
    task = load_task(TaskConfig(name="addition"), 0)
    for limit, expected in ((None, 5 * (8 + MESSAGE_TOKENS)), (500, 508)):
        renderer = PromptRenderer(TOKENIZER, max_prompt_tokens=limit)
        keys = config("task.environment=x.py:X", "environments.max_turns=5")
        lengths = check_lengths(keys, render_rows(task, renderer), renderer, ())
        room = lengths.max_length if limit else lengths.max_length - lengths.longest
        assert room == expected


def test_the_longest_row_is_an_error_before_the_start(large: Task) -> None:
    renderer = PromptRenderer(TOKENIZER, 100, on_overlong="error")
    rendered = render_rows(large, renderer)
    with pytest.raises(TaskError, match=r"1 of [\d]+ prompts are longer than 100.*line12000"):
        check_lengths(config("task.overlong=error"), rendered, renderer, ())
    lengths = check_lengths(config("task.overlong=drop"), rendered, renderer, ())
    assert lengths.overlong == 1
    assert lengths.longest < 100


def test_what_was_not_rendered_is_bounded_by_what_the_engines_have_room_for() -> None:
    task = Made(20_000)
    renderer = PromptRenderer(TOKENIZER, 300)
    rendered = render_rows(task, renderer)
    seen = max(len(prompt.token_ids) for prompt in rendered.prompts)
    assert rendered.rest > seen
    assert rendered.sources is None
    lengths = check_lengths(config(), rendered, renderer, ())
    assert (lengths.longest, lengths.max_length) == (rendered.rest, rendered.rest + 8)
    assert renderer.max_prompt_tokens == rendered.rest


def test_an_overlong_prompt_is_found_when_it_is_drawn(large: Task) -> None:
    for on_overlong in ("error", "drop"):
        renderer = PromptRenderer(TOKENIZER, 100, on_overlong=on_overlong)  # type: ignore[arg-type]
        if on_overlong == "error":
            with pytest.raises(
                TaskError, match=r"has \d+ tokens, more than the 100 .*overlong=dro"
            ):
                sample_prompts(large, renderer, 0, 0, large.train_size())
        else:
            taken = sample_prompts(large, renderer, 0, 0, large.train_size() - 1)
            assert taken.cursor == len(taken.prompts) + len(taken.overlong)
            assert len(taken.overlong) == 1


def test_rows_of_unknown_size_among_many_known_ones_are_looked_at() -> None:
    sizes = np.full(100_000, 50)
    sizes[70_000:70_003] = UNKNOWN
    sizes[81_234] = 51
    indexes = chosen(sizes)
    assert {0, 15, 70_000, 70_001, 70_002, 81_234} <= set(indexes.tolist())
    assert len(indexes) < 1_600
    assert (np.diff(indexes) > 0).all()


def test_few_rows_are_rendered_where_each_is_large() -> None:
    indexes = chosen(np.full(50_000, 1 << 20))
    assert len(indexes) < 16 + 4 + 500 + 5


def test_a_source_that_no_row_has_is_refused_only_where_all_are_known() -> None:
    spec: Any = type("Spec", (), {"sources": ("no-such",), "path": "f:g"})
    renderer = PromptRenderer(TOKENIZER, 300)
    prompts = render_rows(Made(4), renderer)
    with pytest.raises(TaskError, match="source no-such, and the rows' sources are held, made"):
        check_lengths(config(), prompts, renderer, [spec])
    unknown = Rendered(prompts.train, prompts.held_out, 9, 5, None)
    check_lengths(config(), unknown, renderer, [spec])


def test_a_mixture_knows_the_sizes_of_its_parts(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": "x" * n}) + "\n" for n in range(1, 31)))
    parts = [{"name": "addition"}, {"name": "dataset", "data": str(file)}]
    task = load_task(TaskConfig(name="mixture", options={"tasks": parts}), 0)
    survey = survey_of(task)
    assert survey.sources == {"addition", "dataset"}
    for sizes, row_of in ((survey.train_bytes, task.train_row), (survey.eval_bytes, task.eval_row)):
        for index, size in enumerate(sizes):
            row = row_of(index)
            assert size == (UNKNOWN if row.source == "addition" else len(row.content))


def test_the_probe_makes_only_the_rows_that_it_needs() -> None:
    class Careful(Made):
        def train_row(self, index: int) -> Row:
            made.append(index)
            return super().train_row(index)

    made: list[int] = []
    task = Careful(5_000)
    ready = Prepared(config(), "m", 1, task, [], PromptRenderer(TOKENIZER, 300), Lengths(0, 64, 0))
    assert len(first_probe(ready)) == 32
    assert len(made) <= 32
    made.clear()
    task = Careful(1)
    ready = Prepared(config(), "m", 1, task, [], PromptRenderer(TOKENIZER, 300), Lengths(0, 64, 0))
    assert len(first_probe(ready)) >= 2


def test_eval_leaves_out_what_is_too_long_and_says_so() -> None:
    class Heard:
        notes: list[str] = []

        def note(self, text: str) -> None:
            self.notes.append(text)

    heard: Any = Heard()
    console: Console = heard
    rows = [Row("a", "x"), Row("b", "x" * 50), Row("c", "y")]

    def ready(overlong: str) -> Prepared:
        renderer = PromptRenderer(TOKENIZER, 20)
        return Prepared(
            config(f"task.overlong={overlong}"), "m", 1, Made(3), [], renderer, Lengths(0, 28, 0)
        )

    kept, prompts = fitting_rows(ready("drop"), rows, console)
    assert [row.id for row in kept] == ["a", "c"]
    assert [prompt.row_id for prompt in prompts] == ["a", "c"]
    assert heard.notes == ["1 of 3 held-out prompts are longer than 20 tokens and left out"]
    with pytest.raises(TaskError, match=r"1 of 3 held-out .*task\.overlong=drop"):
        fitting_rows(ready("error"), rows, console)
    with pytest.raises(RunError, match=r"1 of 1 held-out .*model\.max_length"):
        fitting_rows(ready("drop"), rows[1:2], console)


def test_progress_is_said_only_when_it_takes_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert list(with_progress(range(1200), "reading a", 1200)) == list(range(1200))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("cohort.rewards.progress.PROGRESS_S", -1.0)
    assert list(with_progress(range(1200), "reading a", 1200)) == list(range(1200))
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(" rows")[0] for line in said] == [
        "reading a: 500 of 1,200", "reading a: 1,000 of 1,200", "reading a: 1,200",
    ]  # fmt: skip


def test_rows_on_disk_are_the_rows_that_were_put_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert KEPT_BYTES > 1 << 20
    rows = [{"text": "é" * (n % 50), "n": n, "x": [None, 1.5, True]} for n in range(2_000)]
    stores = []
    for kept in (1 << 30, 1_000):
        monkeypatch.setattr("cohort.rewards.row_store.KEPT_BYTES", kept)
        store = RowStore()
        for row in rows:
            store.append(row)
        assert len(store) == len(rows)
        assert [store[n] for n in (1999, 0, 7, 1000, 1999)] == [
            rows[n] for n in (1999, 0, 7, 1000, 1999)
        ]
        with pytest.raises(IndexError):
            store[2000]
        stores.append(store)
    assert stores[0].digest() == stores[1].digest()
    changed = RowStore()
    for row in [*rows[:-1], {**rows[-1], "n": -1}]:
        changed.append(row)
    assert changed.digest() != stores[0].digest()


def test_whole_means_few_rows_and_few_bytes(monkeypatch: pytest.MonkeyPatch, large: Task) -> None:
    monkeypatch.setattr(cohort.cluster.lengths, "WHOLE_ROWS", ROWS)
    renderer = Counting(TOKENIZER, 300)
    monkeypatch.setattr(cohort.cluster.lengths, "WHOLE_BYTES", 1000)
    assert not render_rows(large, renderer).whole
    monkeypatch.setattr(cohort.cluster.lengths, "WHOLE_BYTES", 1 << 30)
    assert render_rows(large, renderer).whole


def test_the_renderer_is_what_the_config_says() -> None:
    tokenizer = tokenizer_of(next(family for family in FAMILIES if family.name == "qwen3"))
    question = Row("r", [{"role": "user", "content": "2 + 3?"}])
    given = {"on": "{}", "off": "{enable_thinking: false}"}
    renderers = {
        name: make_renderer(config(f"model.template_arguments={value}"), tokenizer, 512)
        for name, value in given.items()
    }
    texts = {name: renderer.render(question, 0).text or "" for name, renderer in renderers.items()}
    assert texts["off"] == texts["on"] + "<think>\n\n</think>\n\n"
    assert renderers["on"].max_prompt_tokens == 504
    for overlong in ("error", "drop"):
        made = make_renderer(config(f"task.overlong={overlong}"), tokenizer, 512)
        assert made.on_overlong == overlong
    with pytest.raises(TaskError, match="did you mean enable_thinking"):
        make_renderer(config("model.template_arguments={enable_thinkin: false}"), tokenizer, 512)
