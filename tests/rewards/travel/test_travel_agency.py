"""The agency with tools: what its tools say, what a booking earns, what demonstrations do."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from travel_trips import PLAN, QUERY

from cohort.rewards.environments.calls import hermes
from cohort.rewards.environments.tools import tool_schemas
from cohort.rewards.travel.agency import (
    NEEDLESS_QUESTION,
    UNSAID,
    Agency,
    AgencyTask,
    booked,
    booking_in,
    calls,
)
from cohort.rewards.travel.prompt import prompt_text, taste
from cohort.rewards.travel.query import from_columns, to_columns
from cohort.rewards.travel.scores import evaluate


def agency(unclear: bool = False) -> Agency:
    desk = Agency()
    desk.reset(to_columns(QUERY), unclear)
    return desk


def play(desk: Any, reply: str) -> list[str]:
    """Make the calls of a reply; what each tool answered."""
    _, found = hermes(reply)
    assert found
    assert all(error is None for _, _, error in found)
    return [getattr(desk, name)(**arguments) for name, arguments, _ in found]


def score(desk: Agency) -> dict[str, float]:
    [found] = booked(query=[to_columns(QUERY)], environments=[desk])
    return found


def test_the_tools_are_described() -> None:
    names = [schema["function"]["name"] for schema in tool_schemas(Agency)]
    assert names == ["look_up", "ask_customer", "book"]


def test_the_tools_say_what_the_tables_of_the_prompt_say() -> None:
    tables = prompt_text(QUERY)
    for city in ("Alba", "bern "):
        for what in ("hotels", "food", "sights"):
            assert agency().look_up(what, city) in tables
    assert agency().look_up("transport", "Alba") in tables
    with pytest.raises(ValueError, match="no city 'Rome'; there are Alba, Bern"):
        agency().look_up("food", "Rome")
    with pytest.raises(ValueError, match="no 'cars'; there are hotels, food, sights, transport"):
        agency().look_up("cars", "Alba")  # type: ignore[arg-type]


def test_a_booking_earns_what_the_plan_is_worth() -> None:
    desk = agency()
    assert score(desk)["score"] == score(desk)["schema"] == 0
    assert desk.book(**PLAN) == "Booked."
    assert desk.done
    total = evaluate(QUERY, json.dumps(PLAN)).total
    assert total > 1
    assert score(desk) == {
        "score": total,
        "needless_questions": 0.0,
        **evaluate(QUERY, json.dumps(PLAN)).parts,
    }


def test_only_a_question_whose_answer_is_known_costs() -> None:
    desk = agency(unclear=True)
    assert desk.ask_customer("What do you like?") == f"I like {taste(QUERY)}."
    assert score(desk)["score"] == 0
    desk.ask_customer("And what else?")
    assert score(desk)["score"] == pytest.approx(-NEEDLESS_QUESTION)
    clear = agency()
    clear.ask_customer("What do you like?")
    assert score(clear)["needless_questions"] == 1


@pytest.mark.parametrize("level", [1, 3])
def test_demonstrations_look_up_ask_where_needed_and_book_a_plan_that_passes(level: int) -> None:
    task = AgencyTask(0, level=level)
    asked = []
    for index in range(20):
        row = task.train_row(index)
        query = from_columns(row.columns["query"])
        [message] = row.content
        unclear = row.columns["unclear"]
        assert (UNSAID in message["content"]) == unclear != (taste(query) in message["content"])
        assert query.country.cities[0].sights[0].name not in message["content"]
        desk = Agency()
        desk.reset(**row.columns)
        *before, last = task.demonstration(row, 0)
        heard = "\n".join(text for reply in before for text in play(desk, reply))
        asked.append(f"I like {taste(query)}." in heard)
        assert asked[-1] == unclear
        assert not desk.done
        play(desk, last)
        assert desk.done
        assert desk.needless_questions == 0
        assert evaluate(query, desk.booking).passed
        # Everything that is booked was looked up.
        for day in json.loads(desk.booking)["days"]:
            assert all(name in heard for name in [*day["meals"], *day["sights"]])
        assert json.loads(booking_in(last)) == json.loads(desk.booking)
    assert {True, False} == set(asked)


def test_metrics_are_those_of_the_booked_plans() -> None:
    task = AgencyTask(0)
    rows = [task.eval_row(index) for index in range(2)]
    good = task.demonstration(rows[0], 0)[-1]
    found = task.metrics(rows, [good, calls(("ask_customer", {"question": "?"}))])
    assert found["delivery_rate"] == found["final_pass_rate"] == 0.5
    assert booking_in("no call") == booking_in("<tool_call>{") == ""


@pytest.mark.parametrize("days", ["x", [1], [{"city": 1}], [{}], None])
def test_a_booking_that_is_no_plan_earns_nothing(days: Any) -> None:
    desk = agency()
    desk.book(days)
    assert score(desk)["score"] == 0


def test_a_lost_state_is_an_error_and_no_zero() -> None:
    with pytest.raises(AttributeError):
        booked(query=[to_columns(QUERY)], environments=[SimpleNamespace()])
