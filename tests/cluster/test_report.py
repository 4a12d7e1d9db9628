"""What the report reads from a run directory, and the page as text."""

from __future__ import annotations

import json
import math
import random
from datetime import UTC, datetime
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from cohort.cluster.cli import app
from cohort.cluster.observe.report.build import Report, ReportError, build
from cohort.cluster.observe.report.completions import ReportLimits, spread
from cohort.cluster.observe.report.curves import MAX_POINTS, choose_charts, curves, tiles
from cohort.cluster.observe.report.page import render, write_report
from cohort.cluster.observe.report.recorded import ReportedCompletion, Text, read_groups, shorten
from cohort.learner.advantages import advantages
from cohort.learner.checkpoint import MANIFEST
from tests.cluster.runs import lively_run, metrics_row, scored_group, write_rollouts, write_run

NOW = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)
HOSTILE = (
    "</script><script>window.pwned=1</script><!--<script>{{data}}<img src=x onerror=pwned=1>"
    "\x00\x1b\x7f\u2028\u202e&lt;"
)


def rows_of(steps: int) -> list[dict[str, Any]]:
    rng = random.Random(1)
    return [metrics_row(step, rng, steps) for step in range(steps)]


def one_group_run(folder: Path, rewards: list[float | None], *overrides: str) -> Path:
    write_run(folder, rows_of(1), *overrides)
    group = scored_group("g", "?", [f"answer {i}" for i in range(len(rewards))], rewards)
    write_rollouts(folder / "rollouts", 0, [group])
    return folder


def completions(report: Report) -> list[ReportedCompletion]:
    return [one for group in report.completions.groups for one in group.completions]


class _Scripts(HTMLParser):
    """The contents of every script element, and the names of all elements, as a browser sees."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.scripts: list[str] = []
        self.loaded: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script" and self.scripts:
            self.scripts[-1] += data


def data_of(page: str) -> dict[str, Any]:
    data, _ = _Scripts(page).scripts
    loaded: dict[str, Any] = json.loads(data)
    return loaded


# ---- sampling


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, [9]), (2, [0, 9]), (4, [0, 3, 6, 9]), (10, list(range(10))), (99, list(range(10)))],
)
def test_spread_keeps_both_ends(count: int, expected: list[int]) -> None:
    assert spread(range(10), count) == expected


@pytest.mark.parametrize("items", [7, 40, 41, 1000])
@pytest.mark.parametrize("count", [2, 3, 7, 40])
def test_spread_never_repeats_an_item(items: int, count: int) -> None:
    chosen = spread(range(items), count)
    assert len(set(chosen)) == len(chosen) == min(items, count)
    assert chosen == sorted(chosen)


def test_shorten_keeps_both_ends_and_counts_what_is_left_out() -> None:
    text = "".join(chr(0x4E00 + i) for i in range(1000))
    for first in (300, 31, 3):
        once = shorten(Text(text), first)
        for second in (299, 30, 2, 1):
            twice = shorten(once, second)
            assert len(twice.head) + len(twice.tail) == min(first, second)
            assert twice.left_out + len(twice.head) + len(twice.tail) == 1000
            assert text.startswith(twice.head) and text.endswith(twice.tail)
    assert shorten(Text("short"), 5) == Text("short")


def test_recurring_prompts_are_always_there(tmp_path: Path) -> None:
    run = lively_run(tmp_path / "run", steps=50, group_size=2, words=3)
    shown = build(run, ReportLimits(steps=3, groups=1, prompts=2, visits=5), NOW).completions
    assert [view.step for view in shown.steps] == [0, 24, 49]
    assert [view.of for view in shown.steps] == [6, 6, 6]
    (visited,) = shown.recurring
    groups = [shown.groups[place] for place in visited]
    assert [group.step for group in groups] == [0, 12, 24, 37, 49]
    assert {shown.prompts[group.prompt][-1].content.head for group in groups} == {
        "Plan a 5-day trip to Japan, including Kyoto and Tokyo, under $2,000."
    }
    assert len(shown.groups) == len({(group.step, group.prompt) for group in shown.groups})


def test_prompts_recur_by_what_they_ask_not_by_id(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", rows_of(2))
    for step in range(2):
        groups = [scored_group(f"epoch-{step}", "the same question", ["a", "b"], [0.0, 1.0])]
        write_rollouts(run / "rollouts", step, groups)
    assert build(run, ReportLimits(), NOW).completions.recurring == ((0, 1),)


def test_no_prompts_are_looked_for_when_none_are_wanted(tmp_path: Path) -> None:
    run = lively_run(tmp_path / "run", steps=9, group_size=2, words=1)
    report = build(run, ReportLimits(steps=2, prompts=0), NOW)
    assert report.completions.recurring == ()
    assert {group.step for group in report.completions.groups} == {0, 8}


# ---- advantages


@pytest.mark.parametrize("scale", ["group", "none", "batch"])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out", "none"])
def test_advantages_are_the_learners(tmp_path: Path, baseline: Any, scale: Any) -> None:
    rewards: list[float | None] = [0.0, 1.0, None, 0.25]
    run = one_group_run(
        tmp_path / "run", rewards, f"algorithm.baseline={baseline}", f"algorithm.scale={scale}"
    )
    report = build(run, ReportLimits(), NOW)
    spread_of_all = math.sqrt(sum((r - 1.25 / 3) ** 2 for r in (0.0, 1.0, 0.25)) / 3)
    expected = advantages(rewards, baseline, scale, spread_of_all)
    found = [one.advantage for one in completions(report)]
    assert found == pytest.approx(expected)
    assert [one.untrained for one in completions(report)] == ["", "", "no reward", ""]
    assert any(f"algorithm.scale={scale}" in note for note in report.notes)


def test_what_is_not_trained_says_why(tmp_path: Path) -> None:
    equal = one_group_run(tmp_path / "equal", [1.0, 1.0, None])
    assert [(s.advantage, s.untrained) for s in completions(build(equal, ReportLimits(), NOW))] == [
        (None, "group without signal"),
        (None, "group without signal"),
        (None, "no reward"),
    ]
    # The third completion of these groups was truncated at max_tokens.
    masked = one_group_run(tmp_path / "cut", [1.0, 0.0, 0.0], "algorithm.mask_truncated=true")
    assert [s.untrained for s in completions(build(masked, ReportLimits(), NOW))] == [
        "",
        "",
        "truncated",
    ]
    single = one_group_run(tmp_path / "single", [1.0, None])
    (first, _) = completions(build(single, ReportLimits(), NOW))
    assert first.untrained == "the only reward of its group"


def test_advantages_need_the_algorithm(tmp_path: Path) -> None:
    run = one_group_run(tmp_path / "run", [0.0, 1.0])
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("baseline: mean", "advantage: zscore"))
    report = build(run, ReportLimits(), NOW)
    assert [(s.advantage, s.untrained) for s in completions(report)] == [(None, ""), (None, "")]
    assert any("algorithm.advantage" in note for note in report.notes)
    assert (report.run.steps_total, report.run.model) == (1, "some/model")


# ---- metrics


def test_curves_hold_every_metric_and_every_step() -> None:
    rows = [{"step": i, "reward/mean": i / 10, "learner/loss": None} for i in range(20)]
    rows[3]["reward/mean"] = None
    rows[4]["reward/mean"] = math.nan
    drawn = curves(rows)
    assert (drawn.steps, drawn.steps_per_point) == (tuple(range(20)), 1)
    (series,) = drawn.series  # a metric without any value is none
    assert series.mean[2:6] == (0.2, None, None, 0.5)


def test_long_runs_become_points_with_their_extremes() -> None:
    count = 4 * MAX_POINTS + 1
    drawn = curves([{"step": i, "x": float(i)} for i in range(count)])
    assert drawn.steps_per_point == 5
    assert len(drawn.steps) == math.ceil(count / 5) <= MAX_POINTS
    series = drawn.series[0]
    assert (series.mean[0], series.low[0], series.high[0], drawn.steps[0]) == (2.0, 0.0, 4.0, 2)
    assert series.high[-1] == count - 1


def test_every_metric_is_in_one_chart() -> None:
    keys = sorted({*rows_of(1)[0], "some/new_metric", "reward/plan/cost"} - {"step"})
    charts = choose_charts(keys)
    shown = [key for chart in charts for key in chart.keys]
    assert set(keys) <= set(shown)
    # time/reward is a part of the step, and a curve of its own.
    assert {key for key in shown if shown.count(key) > 1} == {"time/reward"}
    by_key = {key: chart for chart in charts for key in chart.keys}
    assert by_key["reward/plan/cost"].section == "Reward"
    assert by_key["rewards/latency_p99"].section == "Time"
    assert by_key["some/new_metric"].section == "Other metrics"


def test_tiles_tell_first_and_last_steps() -> None:
    rows = [{"step": i, "reward/mean": 0.0 if i < 10 else 1.0} for i in range(20)]
    reward = tiles(rows, 16)[0]
    assert (reward.value, reward.detail) == ("1.000", "last 10 steps; first 10: 0.000")
    assert tiles([], 16) == ()
    assert tiles([{"step": 0}], None)[0].value == "–"


# ---- runs as they are found


def test_a_run_that_goes_on_or_is_damaged_at_its_end(tmp_path: Path) -> None:
    run = lively_run(tmp_path / "run", steps=3, group_size=2, words=2)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "reward/me')
    newest = run / "rollouts" / "step-000002.jsonl"
    whole = newest.read_bytes()
    newest.write_bytes(whole[: len(whole) - 40] + b"\xff\xfe")
    (run / "rollouts" / "step-000003.jsonl.tmp").write_text("{")
    (run / "rollouts" / "step-last.jsonl").write_text("{")
    (run / "rollouts" / "step-000004.jsonl").write_text('[]\n{"step": 4}\n"x"\n' + "[" * 100_000)
    report = build(run, ReportLimits(), NOW)
    assert (report.run.steps_done, report.run.steps_total) == (3, 23)
    assert [view.step for view in report.completions.steps] == [0, 1, 2, 4]
    assert report.completions.unread == 1 + 4
    assert any(note.startswith("5 lines") for note in report.notes)


@pytest.mark.parametrize(
    "change",
    [
        {"completion": None},
        {"reward": "high"},
        {"reward": 10**400},
        {"by_function": []},
        {"errors": None},
        {"tokens": -1},
        {"group_id": ["a"]},
        {"weight_versions": 3},
    ],
)
def test_rows_of_another_form_are_left_out(tmp_path: Path, change: dict[str, Any]) -> None:
    run = one_group_run(tmp_path / "run", [0.0, 1.0, 0.5])
    file = run / "rollouts" / "step-000000.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    rows[1] |= change
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (group,), unread = read_groups(file)
    assert ([s.reward for s in group.completions], unread) == ([0.0, 0.5], 1)


def test_a_run_without_rollouts_steps_or_config(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    report = build(tmp_path, ReportLimits(), NOW)
    assert (report.run.steps_done, report.run.steps_total, report.tiles) == (0, None, ())
    assert report.completions.steps == ()
    assert any("config.yaml" in note for note in report.notes)
    assert any("no rollouts" in note for note in report.notes)
    assert data_of(render(report, 1_000_000))["curves"]["steps"] == []


def test_where_the_run_is(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", rows_of(7), steps=10)
    for step, complete in ((3, True), (6, True), (7, False)):
        folder = run / "checkpoints" / f"step-{step}"
        folder.mkdir(parents=True)
        if complete:
            (folder / MANIFEST).write_text("{}")
            (folder / "COMPLETE").touch()
    state = build(run, ReportLimits(), NOW).run
    assert (state.steps_done, state.steps_total, state.checkpoint) == (7, 10, 6)
    assert state.made == "2026-01-02 03:04 UTC"
    assert state.seconds == pytest.approx(sum(row["time/step"] for row in rows_of(7)))


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        (None, "not a run directory"),
        ('{"step": 0}\nnonsense\n{"step": 2}\n', "line 2"),
        ('{"reward/mean": 0}\n', "line 1 has no step"),
        ('[1]\n{"step": 1}\n', "line 1 has no step"),
    ],
)
def test_what_is_no_run_is_one_clear_error(
    tmp_path: Path, metrics: str | None, message: str
) -> None:
    if metrics is not None:
        (tmp_path / "metrics.jsonl").write_text(metrics)
    result = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert result.exit_code == 1
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "report.html").exists()


# ---- the page


def test_the_page_loads_nothing_and_hostile_text_stays_data(tmp_path: Path) -> None:
    run = write_run(tmp_path / "<img src=x onerror=alert(1)>", rows_of(1))
    group = scored_group(
        "g" + HOSTILE, HOSTILE, [HOSTILE, "b"], [0.0, None], [HOSTILE, "__proto__"]
    )
    write_rollouts(run / "rollouts", 0, [group])
    page = render(build(run, ReportLimits(), NOW), 10_000_000)
    found = _Scripts(page)
    assert found.names.count("script") == 2 and "img" not in found.names
    assert found.loaded == []
    data = data_of(page)
    (shown,) = data["completions"]["groups"]
    assert shown["completions"][0]["text"] == HOSTILE
    assert shown["functions"] == [HOSTILE, "__proto__"]
    assert data["run"]["name"] == run.name


def test_broken_surrogates_reach_the_page(tmp_path: Path) -> None:
    run = one_group_run(tmp_path / "run", [0.0, 1.0])
    file = run / "rollouts" / "step-000000.jsonl"
    file.write_text(file.read_text().replace("answer 0", r"\ud83d alone \udc00"))
    out = tmp_path / "page.html"
    write_report(run, out, ReportLimits(), 10, NOW)
    shown = data_of(out.read_text(encoding="utf-8"))["completions"]["groups"][0]["completions"][0]
    assert shown["text"] == "\ud83d alone \udc00"


def test_the_page_keeps_its_size(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", rows_of(2))
    for step in range(2):
        texts = ["long " * 60_000, "漢字" * 30_000, "short"]
        groups = [scored_group(f"{step}", "?" * 50_000, texts, [0.0, 1.0, 0.5])]
        write_rollouts(run / "rollouts", step, groups)
    report = build(run, ReportLimits(), NOW)
    for megabytes in (0.9, 0.3):
        page = render(report, int(megabytes * 1e6))
        assert 0.4 * megabytes * 1e6 < len(page.encode()) <= megabytes * 1e6
        (long, kanji, short) = data_of(page)["completions"]["groups"][0]["completions"]
        head, left_out, tail = long["text"]
        assert len(head) + left_out + len(tail) == 300_000
        assert kanji["text"][1] > 0 and short["text"] == "short"
    with pytest.raises(ReportError, match=r"lower --steps, --groups or --prompts, or raise --max-"):
        render(report, 30_000)


def test_the_command_writes_beside_the_run_or_elsewhere(tmp_path: Path) -> None:
    run = lively_run(tmp_path / "run", steps=4, group_size=2, words=2)
    first = CliRunner().invoke(app, ["report", str(run)])
    assert (first.exit_code, first.stdout) == (0, f"page written to {run / 'report.html'}\n")
    out = tmp_path / "page.html"
    options = ["--out", str(out), "--steps", "2", "--groups", "3", "--prompts", "0"]
    assert CliRunner().invoke(app, ["report", str(run), *options]).exit_code == 0
    shown = data_of(out.read_text())["completions"]
    assert [len(view["groups"]) for view in shown["steps"]] == [3, 3]
    for bad in (tmp_path, tmp_path / "missing" / "page.html"):
        failed = CliRunner().invoke(app, ["report", str(run), "--out", str(bad)])
        assert failed.exit_code == 1 and "--out" in failed.stderr
