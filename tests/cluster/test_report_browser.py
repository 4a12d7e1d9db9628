"""The report in a real headless browser, from a file, with text that tries to break it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from cohort.cluster.observe.report.completions import ReportLimits
from cohort.cluster.observe.report.curves import MAX_POINTS
from cohort.cluster.observe.report.page import write_report
from tests.cluster.browser import NAMES, Browser, find_browser
from tests.cluster.runs import lively_run, metrics_row, scored_group, write_rollouts, write_run

PROGRAM = find_browser()
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        PROGRAM is None, reason=f"no browser is installed: none of {', '.join(NAMES)}"
    ),
]

STEPS = 30
ATTACKS = (
    "</script><script>window.pwned = 1</script>",
    "<img src=x onerror='window.pwned = 1'><svg onload='window.pwned = 1'>",
    "<!--<script>{{data}} {{script}} ${window.pwned = 1} `",
    "</pre></article></main><style>body { display: none }</style>",
    "<a href='javascript:window.pwned = 1'>&lt;b&gt; &amp;</a> \\u003c \\ \" '",
    "\t tab\n  two lines, 漢字, 🙂, e\u0301",
)
INVISIBLE = "a\x00b\x1bc\x7fd\u202ee\u2028f\u200bg"
NAMED = "a␀b␛cU+007FdU+202EeU+2028fU+200Bg"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert PROGRAM is not None
    with Browser(PROGRAM, tmp_path_factory.mktemp("browser") / "profile") as browser:
        yield browser


@pytest.fixture
def page(browser: Browser) -> Iterator[Browser]:
    """The browser; at the end nothing may have gone wrong, and nothing been loaded."""
    browser.problems.clear()
    browser.requests.clear()
    yield browser
    assert browser.run("window.pwned") is None
    assert browser.problems == []
    assert browser.requests and all(url.startswith("file:///") for url in browser.requests)
    assert len(set(browser.requests)) == 1


def report_of(run: Path, limits: ReportLimits | None = None) -> Path:
    now = datetime(2026, 1, 2, tzinfo=UTC)
    return write_report(run, None, limits or ReportLimits(), 10.0, now)


@pytest.fixture(scope="module")
def lively(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = lively_run(tmp_path_factory.mktemp("lively") / "run", STEPS, group_size=4, words=12)
    return report_of(run, ReportLimits(steps=10))


def points(browser: Browser, chart: str) -> list[list[float]]:
    """The points of the thin line of a chart."""
    found: list[list[float]] = browser.run(
        f"""[...document.querySelectorAll('[data-chart="{chart}"] .raw')].flatMap(
            line => [...line.points].map(point => [point.x, point.y]))"""
    )
    return found


def texts(browser: Browser, selector: str) -> list[str]:
    found: list[str] = browser.run(
        f"[...document.querySelectorAll({selector!r})].map(node => node.textContent)"
    )
    return found


def test_curves_have_a_point_for_every_step(page: Browser, lively: Path) -> None:
    page.open(lively)
    for chart in (
        "Mean reward",
        "accuracy",
        "travel/cultural_richness",
        "Groups without signal",
        "Completion length",
        "Truncated completions",
        "Scoring",
        "rewards/latency_p99",
    ):
        drawn = points(page, chart)
        assert len(drawn) == STEPS, chart
        # From left to right in equal distances.
        widths = {round(b[0] - a[0]) for a, b in pairwise(drawn)}
        assert max(widths) - min(widths) <= 1 and min(widths) > 0, chart
    reward = points(page, "Mean reward")
    values = [metrics["reward/mean"] for metrics in rows(STEPS)]
    # Up is more: the heights are a linear function of the values.
    low, high = values.index(min(values)), values.index(max(values))
    scale = (reward[low][1] - reward[high][1]) / (values[high] - values[low])
    for point, value in zip(reward, values, strict=True):
        assert reward[low][1] - point[1] == pytest.approx((value - values[low]) * scale, abs=0.5)
    areas = page.run(
        """[...document.querySelectorAll('[data-chart="Where the time of a step goes"] .area')]
           .map(area => area.points.length)"""
    )
    assert areas == [2 * STEPS] * 5


def rows(steps: int) -> list[dict[str, Any]]:
    rng = random.Random(0)
    return [metrics_row(step, rng, steps) for step in range(steps)]


def test_gaps_and_single_steps_are_drawn(page: Browser, tmp_path: Path) -> None:
    metrics = rows(8)
    for step in (0, 3, 5):
        metrics[step]["reward/mean"] = None
    page.open(report_of(write_run(tmp_path / "gaps", metrics)))
    assert len(points(page, "Mean reward")) == 5
    # Step 4 stands alone between two gaps.
    assert (
        page.run("""document.querySelectorAll('[data-chart="Mean reward"] circle').length""") == 1
    )
    page.requests.clear()
    page.open(report_of(write_run(tmp_path / "one", rows(1))))
    assert len(points(page, "Mean reward")) == 1
    page.requests.clear()
    page.open(report_of(write_run(tmp_path / "none", [])))
    assert "No step is finished yet." in texts(page, "#charts p")


def test_a_long_run_is_drawn_in_bounded_points(page: Browser, tmp_path: Path) -> None:
    steps = 3 * MAX_POINTS
    page.open(report_of(write_run(tmp_path / "long", rows(steps))))
    assert len(points(page, "Mean reward")) == MAX_POINTS
    bands = """document.querySelector('[data-chart="Mean reward"] .band').points.length"""
    assert page.run(bands) == 2 * MAX_POINTS
    assert any("1,500 steps are drawn as 500 points" in note for note in texts(page, "#notes li"))


def test_the_slider_changes_the_completions(page: Browser, lively: Path) -> None:
    page.open(lively)
    page.run("document.getElementById('step').focus()")
    last = texts(page, "#group .completion .text")
    assert len(last) == 4 and texts(page, "#step-name")[0].startswith("step 29")
    line = "+document.querySelector('[data-chart=\"Mean reward\"] .here').getAttribute('x1')"
    there = page.run(line)
    page.press("ArrowLeft")
    before = texts(page, "#group .completion .text")
    assert before != last and texts(page, "#step-name")[0].startswith("step 26")
    # The mark in the charts goes along.
    assert page.run(line) < there
    page.press("Home")
    assert texts(page, "#step-name")[0].startswith("step 0")
    assert page.run("document.getElementById('previous').disabled") is True
    page.press("End")
    assert texts(page, "#group .completion .text") == last
    page.run("document.getElementById('previous').click()")
    assert texts(page, "#group .completion .text") == before


def test_a_click_into_a_chart_moves_the_slider(page: Browser, lively: Path) -> None:
    page.open(lively)
    x, y = page.run(
        """(() => { const chart = document.querySelector('[data-chart="Mean reward"]');
            chart.scrollIntoView();
            const box = chart.getBoundingClientRect();
            const point = chart.querySelector('.raw').points[10];
            return [box.left + point.x, box.top + point.y]; })()"""
    )
    page.click(x, y)
    assert texts(page, "#step-name")[0].startswith("step 10")
    readout = page.run(
        """document.querySelector('[data-chart="Mean reward"]')
           .closest('.chart').querySelector('.readout').textContent"""
    )
    assert readout.startswith("step 10: ")


def test_a_group_shows_rewards_functions_and_advantages(page: Browser, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", rows(1))
    first = scored_group("a", "first question", ["w", "x", "y", "z"], [0.0, 1.0, 0.5, None])
    second = scored_group("b", "second question", ["p", "q"], [1.0, 1.0])
    write_rollouts(run / "rollouts", 0, [first, second])
    page.open(report_of(run))
    scores = texts(page, "#group .scores")
    assert scores == [
        "reward 0advantage −1.22",
        "reward 1advantage +1.22",
        "reward 0.5advantage 0.00",
        "reward –not trained: no reward",
    ]
    assert texts(page, "#group .functions")[:2] == ["accuracy0", "accuracy1"]
    assert texts(page, "#group .error") == ["accuracy raised: ValueError: no number in <b>"]
    assert "truncated" in texts(page, "#group .facts")[2]
    page.run("""(() => { const order = document.getElementById('order');
        order.value = 'best'; order.dispatchEvent(new Event('change')); })()""")
    assert texts(page, "#group .completion .text") == ["x", "y", "w", "z"]
    page.run("document.querySelectorAll('#group-tabs button')[1].click()")
    assert texts(page, "#group .prompt .text")[-1] == "second question"
    assert texts(page, "#group .scores")[0] == "reward 1not trained: group without signal"


def test_the_same_prompt_is_shown_at_several_steps(page: Browser, lively: Path) -> None:
    page.open(lively)
    headings = texts(page, "#visits h3")
    assert len(headings) == 8
    assert headings[0].startswith("step 0 ·") and headings[-1].startswith("step 29 ·")
    assert len(texts(page, "#visits .completion")) == 8 * 4
    assert "Plan a 5-day trip to Japan" in texts(page, "#visit-prompt .text")[-1]


def test_hostile_text_is_shown_as_it_is(page: Browser, tmp_path: Path) -> None:
    run = write_run(tmp_path / "<img src=x onerror=alert(1)>", rows(2))
    functions = ["</dl><script>window.pwned = 1</script>", "__proto__", "constructor"]
    rewards = [0.0, None, 1.0, 0.5, 0.25, 0.75]
    for step in range(2):
        group = scored_group(ATTACKS[0], ATTACKS[1], ATTACKS, rewards, functions)
        write_rollouts(run / "rollouts", step, [group])
    page.open(report_of(run))
    assert texts(page, "#group .completion .text") == list(ATTACKS)
    assert texts(page, "#visits .completion .text") == list(ATTACKS) * 2
    assert texts(page, "#group .prompt .text")[-1] == ATTACKS[1]
    assert texts(page, "#group .completion:first-child dt") == functions
    assert texts(page, "h1") == [run.name]
    assert page.run("document.title") == f"{run.name} · cohort report"
    # Nothing of it became an element.
    assert page.run("document.querySelectorAll('script').length") == 2
    assert page.run("document.querySelectorAll('main img, main style, main a').length") == 0
    assert page.run("getComputedStyle(document.body).display") == "block"


def test_the_page_lets_no_other_script_run(browser: Browser, lively: Path) -> None:
    browser.open(lively)
    browser.problems.clear()
    browser.run("""document.body.insertAdjacentHTML(
        'beforeend', '<img src="data:," onerror="window.planted = 1">')""")
    browser.run("""document.body.append(Object.assign(
        document.createElement('script'), {textContent: 'window.planted = 1'}))""")
    browser.run("new Promise(done => setTimeout(done, 200))")
    assert browser.run("window.planted") is None
    assert any("Content Security Policy" in problem for problem in browser.problems)


def test_invisible_characters_are_named(page: Browser, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", rows(1))
    write_rollouts(run / "rollouts", 0, [scored_group("g", "?", [INVISIBLE, "SURROGATE"], [0, 1])])
    file = run / "rollouts" / "step-000000.jsonl"
    file.write_text(
        file.read_text().replace("SURROGATE", r"\ud83d alone \udc00, pair \ud83d\ude42")
    )
    page.open(report_of(run))
    assert texts(page, "#group .completion .text") == [NAMED, "U+D83D alone U+DC00, pair 🙂"]


def test_long_texts_keep_their_ends(page: Browser, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", rows(1))
    text = "begin " + "x" * 1_000_000 + " end"
    write_rollouts(run / "rollouts", 0, [scored_group("g", "?", [text, ""], [0.0, 1.0])])
    page.open(report_of(run))
    (long, empty) = texts(page, "#group .completion .text")
    assert long.startswith("begin xxx") and long.endswith("xxx end")
    assert "… 900,010 characters left out …" in long
    assert empty == "(empty)"


@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_fits_the_window(page: Browser, tmp_path: Path, width: int, dark: bool) -> None:
    run = write_run(tmp_path / ("long-name-" * 15), rows(30))
    text = "unbroken" * 200 + "\n" + "| cell " * 60
    functions = ["a_function_with_quite_a_long_name/and_a_part_of_it" * 2]
    for step in range(2):
        group = scored_group("g", text, [text] * 9, [0.1 * i for i in range(9)], functions)
        write_rollouts(run / "rollouts", step, [group])
    page.open(report_of(run), width, dark)
    page.run("document.querySelectorAll('details').forEach(part => part.open = true)")
    root = "document.documentElement"
    assert page.run("innerWidth") == width
    assert page.run(f"{root}.scrollWidth - {root}.clientWidth") == 0
    # No card sticks out of the page, or holds more than fits its width.
    cards = ".chart, .tile, #group .completion, .prompt, button"
    sticking_out = page.run(
        f"""[...document.querySelectorAll('{cards}')].filter(
            card => card.scrollWidth > card.clientWidth + 2
                || card.getBoundingClientRect().right > innerWidth).map(card => card.outerHTML)"""
    )
    assert sticking_out == []
    light = page.run(
        """getComputedStyle(document.body).backgroundColor.match(/\\d+/g)
           .every(part => part > 127)"""
    )
    assert light is not dark
