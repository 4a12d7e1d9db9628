"""Every rule has a change of the right plan that breaks it and nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from travel_trips import COST, PLAN, QUERY, evaluated, failed, plan

from cohort.rewards.travel.query import Query
from cohort.rewards.travel.rules import COMMONSENSE, HARD

Days = list[dict[str, Any]]
HARD_NAMES = {rule.name for rule in HARD}


def changed(change: Callable[[Days], Any]) -> dict[str, Any]:
    value = plan()
    change(value["days"])
    return value


def test_the_right_plan_breaks_no_rule_and_every_rule_applies() -> None:
    found = evaluated(PLAN)
    assert found.passed and found.delivered and found.coverage == 1
    assert {f.rule for f in found.commonsense} == {rule.name for rule in COMMONSENSE}
    assert {f.rule for f in found.hard} == HARD_NAMES
    assert (found.commonsense_fraction, found.hard_fraction) == (1, 1)
    assert found.cost == COST
    assert found.total == 1 + 0.5 * found.soft.mean


BREAKS: list[tuple[str, Callable[[Days], Any]]] = [
    ("within_city", lambda d: d[1].update(meals=["Bern Spoon"])),
    ("within_city", lambda d: d[2].update(hotel="Alba Inn")),
    ("transport", lambda d: d[2].pop("travel")),
    ("transport", lambda d: d[1].update(travel="train")),
    ("transport", lambda d: d[0].update(travel="train")),
    ("diverse_restaurants", lambda d: d[1].update(meals=["Alba Cup"])),
    ("diverse_sights", lambda d: d[3].update(sights=["Bern Castle"])),
    ("diverse_sights", lambda d: d[3].update(sights=["Bern Temple", "Bern Temple"])),
    ("open", lambda d: d[1].update(sights=["Alba Museum"])),
    ("open", lambda d: d[3].update(sights=["Bern Garden"])),
    ("nights", lambda d: d[3].update(hotel="Bern Inn")),
    ("nights", lambda d: d[2].update(hotel="Bern Lodge")),
    ("nights", lambda d: [d[n].update(hotel="Alba Lodge") for n in (0, 1)]),
    ("budget", lambda d: d[0].update(hotel="Alba Grand")),
    ("room_type", lambda d: d[0].update(hotel="Alba Barn")),
    ("house_rule", lambda d: d[1].update(hotel="Alba Rooms")),
    ("cuisine", lambda d: d[0].update(meals=["Alba Spoon"])),
    ("avoid", lambda d: d[2].update(travel="bus")),
]


@pytest.mark.parametrize(("rule", "change"), BREAKS)
def test_a_change_breaks_its_rule_alone(rule: str, change: Callable[[Days], Any]) -> None:
    found = evaluated(changed(change))
    assert failed(found) == {rule}
    assert not found.passed
    assert found.total < 1
    assert found.soft.mean == 0


# Where these fail, the hard rules are not applied at all, as in TravelPlanner.
GATES: list[tuple[str, Callable[[Days], Any]]] = [
    ("within_world", lambda d: d[1].update(meals=["Alba Knife"])),
    ("within_world", lambda d: d[1].update(hotel="Alba Cup")),
    ("within_world", lambda d: d[1].update(sights=["Alba Temрle"])),  # a Cyrillic letter
    ("within_world", lambda d: d[1].update(sights=["Alba\u200b Park"])),
    ("complete", lambda d: d[1].update(meals=[])),
    ("complete", lambda d: d[1].update(meals=["Alba Fork", "Alba Spoon"])),
    ("complete", lambda d: d[3].update(sights=[])),
    ("complete", lambda d: d[1].pop("hotel")),
    ("complete", lambda d: d.pop(1)),
]


@pytest.mark.parametrize(("rule", "change"), GATES)
def test_hard_rules_are_not_applied_to_a_plan_with_gaps_or_inventions(
    rule: str, change: Callable[[Days], Any]
) -> None:
    found = evaluated(changed(change))
    assert failed(found) - {"transport"} == {rule} | HARD_NAMES
    assert found.hard_fraction == 0
    assert 0.125 < found.total < 0.125 + 0.25


def test_too_many_sights_in_a_day() -> None:
    query = dataclasses.replace(QUERY, first_weekday=2)
    sights = [sight.name for sight in query.country.cities[0].sights]
    value = changed(lambda d: (d[0].update(sights=sights), d[1].update(sights=sights[:1])))
    assert failed(evaluated(value, query)) >= {"complete"}
    value = changed(lambda d: d[0].update(sights=sights[::2]))
    assert evaluated(value, query).passed


def test_route() -> None:
    back = changed(lambda d: d[1].update(city="Bern", travel="train", hotel="Bern Inn"))
    back["days"][1].update(meals=["Bern Spoon"], sights=["Bern Castle"])
    back["days"][2].update(city="Alba", hotel="Alba Inn", meals=["Alba Fork"])
    back["days"][2].update(sights=["Alba Park"])
    back["days"][3]["travel"] = "train"
    assert failed(evaluated(back, dataclasses.replace(QUERY, budget=5000))) == {"route"}
    elsewhere = dataclasses.replace(QUERY, start="Bern")
    assert failed(evaluated(PLAN, elsewhere)) == {"route"}


def test_a_hired_car_goes_all_the_way() -> None:
    assert evaluated(changed(lambda d: d[2].update(travel="car"))).passed
    # A third city, reached by train after the first leg by car.
    country = QUERY.country
    cora = dataclasses.replace(country.cities[1], name="Cora")
    cora = dataclasses.replace(
        cora,
        hotels=(),
        restaurants=tuple(
            dataclasses.replace(r, name=f"C {r.name}", city="Cora") for r in cora.restaurants
        ),
        sights=tuple(dataclasses.replace(s, name=f"C {s.name}", city="Cora") for s in cora.sights),
    )
    leg = dataclasses.replace(country.legs[0], cities=("Cora", "Bern"))
    wider = dataclasses.replace(country, cities=(*country.cities, cora), legs=(*country.legs, leg))
    query = dataclasses.replace(QUERY, country=wider)
    value = changed(lambda d: d[2].update(travel="train"))
    value["days"][3] = {
        "city": "Cora",
        "travel": "train",
        "meals": ["C Bern Cup"],
        "sights": ["C Bern Castle"],
    }
    assert evaluated(value, query).passed
    value["days"][2]["travel"] = "car"
    assert failed(evaluated(value, query)) == {"transport"}


def test_days_and_cities() -> None:
    longer = changed(
        lambda d: (
            d[3].update(hotel="Bern Inn"),
            d.append({"city": "Bern", "meals": ["Bern Spoon"], "sights": ["Bern Garden"]}),
        )
    )
    assert failed(evaluated(longer, dataclasses.replace(QUERY, budget=5000))) == {"days"}
    more = dataclasses.replace(QUERY, cities=("Alba", "Bern", "Cora"))
    assert failed(evaluated(PLAN, more)) == {"cities"}


def test_the_budget_is_a_bound_that_may_be_reached() -> None:
    assert evaluated(PLAN, dataclasses.replace(QUERY, budget=COST)).passed
    assert failed(evaluated(PLAN, dataclasses.replace(QUERY, budget=COST - 1))) == {"budget"}


def test_cost_counts_rooms_for_two() -> None:
    def cost(party: int) -> int | None:
        return evaluated(PLAN, dataclasses.replace(QUERY, party=party)).cost

    assert cost(1) == 290 + 102
    assert cost(3) == 2 * 290 + 3 * 102


def rules_of(query: Query) -> set[str]:
    found = evaluated(PLAN, query)
    return {finding.rule for finding in (*found.commonsense, *found.hard)}


def test_rules_that_a_query_does_not_have_are_not_counted() -> None:
    bare = dataclasses.replace(
        QUERY,
        country=QUERY.country.only(["Alba"]),
        cities=(),
        start=None,
        room=None,
        house_rule=None,
        cuisines=(),
        avoid=None,
    )
    assert rules_of(bare) == {
        "within_world",
        "complete",
        "diverse_restaurants",
        "diverse_sights",
        "open",
        "nights",
        "days",
        "budget",
    }
    one_day = dataclasses.replace(bare, days=1, max_sights=1)
    assert rules_of(one_day) == {"within_world", "complete", "open", "days", "budget"}


def test_a_missing_way_lowers_the_coverage_and_hides_its_price() -> None:
    found = evaluated(changed(lambda d: d[2].pop("travel")))
    assert found.cost == COST - 60
    assert found.coverage == 11 / 12
    # All hard rules hold, but the unpaid journey must not earn for staying in the budget.
    assert found.hard_passed and found.hard_fraction == 0


COVERAGE: list[tuple[Callable[[Days], Any], float]] = [
    (lambda d: d[1].update(meals=["Alba Cup"]), 11 / 12),  # again
    (lambda d: d[1].update(meals=["Bern Spoon"]), 11 / 12),  # elsewhere
    (lambda d: d[1].update(meals=["Alba Knife"]), 11 / 12),  # nowhere
    (lambda d: d[1].update(hotel="Bern Inn"), 11 / 12),
    (lambda d: d[1].update(meals=["Alba Fork", "Alba Spoon"]), 12 / 13),
    (lambda d: d[1].update(sights=["Alba Park", "Alba Museum"]), 1.0),
    (lambda d: d[1].update(sights=["Alba Park", "Alba Museum", "x"]), 12 / 13),
    (lambda d: d[3].update(hotel="Bern Inn"), 12 / 13),
    (lambda d: d[3].update(travel="train"), 12 / 13),
    (lambda d: d.append({"city": "Bern", "meals": ["Bern Spoon"], "sights": []}), 12 / 14),
    (lambda d: d.pop(3), 10 / 12),
    (lambda d: [d.pop() for _ in range(3)], 3 / 11),
]


@pytest.mark.parametrize(("change", "expected"), COVERAGE)
def test_coverage_by_hand(change: Callable[[Days], Any], expected: float) -> None:
    # Four days of a meal and a sight, three nights, one journey: twelve bookings.
    assert evaluated(changed(change)).coverage == expected


def test_names_are_compared_without_case_width_and_spaces() -> None:
    wide = "".join(chr(ord(c) + 0xFEE0) if c != " " else c for c in "Alba Cup")
    assert evaluated(changed(lambda d: d[0].update(meals=[wide], city=" ALBA "))).passed
    for name in (wide, "alba  cup", "ALBA CUP"):
        again = changed(lambda d, name=name: d[1].update(meals=[name]))
        assert failed(evaluated(again)) == {"diverse_restaurants"}
