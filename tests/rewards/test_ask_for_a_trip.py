"""The script that asks a served model for a trip, as a user runs it."""

from __future__ import annotations

import pytest
from model_server import Server, says

from cohort.rewards.travel.generate import trip
from cohort.rewards.travel.plan import to_json
from cohort.rewards.travel.solver import cheapest
from tests.scripts import ask_for_a_trip

# Each starts the script, which is mostly imports.
pytestmark = pytest.mark.slow

JAPAN = (
    "Plan a 5-day trip to Japan, including Kyoto and Tokyo, focusing on cultural experiences "
    "and staying under $2,000."
)


def good_plan() -> str:
    solution = cheapest(trip("Japan", ("Kyoto", "Tokyo"), 5, 2000))
    assert solution is not None
    return to_json(solution.plan)


def test_the_best_of_several_answers_is_shown(server: Server) -> None:
    plan = good_plan()
    _, body = says("I would rather not.")
    body["choices"] += [says(text)[1]["choices"][0] for text in (plan.replace("Kyoto", "X"), plan)]
    server.reply = lambda *_: (200, body)
    done = ask_for_a_trip("--url", f"{server.url}/v1", "--model", "m", "--samples", "3")
    assert done.returncode == 0, done.stderr
    (request,) = server.requests
    assert request["n"] == 3
    assert "seed" not in request
    assert JAPAN in request["messages"][0]["content"]
    lines = done.stdout.splitlines()
    assert lines[0] == JAPAN
    rows = [line for line in lines if line.startswith(("  1 ", "  2 ", "  3 "))]
    assert rows[0].endswith("no itinerary: no JSON object")
    assert "breaks within_world" in rows[1]
    assert "breaks" not in rows[2]
    assert any(line.startswith("The best is #3, with 1.") for line in lines)
    assert sum(line.startswith("Day ") for line in lines) == 5
    assert "not in the tables" not in done.stdout
    solution = cheapest(trip("Japan", ("Kyoto", "Tokyo"), 5, 2000))
    assert solution is not None
    assert lines[-1] == f"In all ${solution.cost:,} of $2,000, for 1"


def test_an_invented_name_is_marked(server: Server) -> None:
    server.reply = lambda *_: says(
        '{"days":[{"city":"Atlantis","meals":["Blue Whale"],"sights":["A \\u001b[2J"]}]}'
    )
    done = ask_for_a_trip("--url", f"{server.url}/v1", "--model", "m", "--samples", "1")
    assert done.returncode == 0
    assert "Blue Whale: not in the tables" in done.stdout
    assert "\x1b" not in done.stdout


def test_answers_without_json(server: Server) -> None:
    server.reply = lambda *_: says("No trips today.")
    done = ask_for_a_trip("--url", f"{server.url}/v1", "--model", "m", "--samples", "1")
    assert done.returncode == 1
    assert "No answer holds an itinerary. The first one begins: 'No trips today.'" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--url", "http://127.0.0.1:9/v1"], "no server answers at http://127.0.0.1:9/v1: start"),
        (["--budget", "20"], "budget 20 is too small"),
        (["--cities", "Kyoto,Rome"], "'Rome' is not in Japan"),
    ],
)
def test_what_cannot_be_asked(arguments: list[str], words: str) -> None:
    done = ask_for_a_trip(*arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_server_that_refuses(server: Server) -> None:
    server.reply = lambda *_: (400, {"error": {"message": "the prompt is too long"}})
    done = ask_for_a_trip("--url", f"{server.url}/v1", "--model", "m")
    assert done.returncode == 2
    assert "refused" in done.stderr and "the prompt is too long" in done.stderr
    assert "Traceback" not in done.stderr
