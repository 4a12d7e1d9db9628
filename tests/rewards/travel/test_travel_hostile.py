"""Nothing that games the rules scores above an honest plan with one gap."""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Callable
from typing import Any

import pytest

from cohort.rewards.travel.generate import LEVELS, make_query
from cohort.rewards.travel.plan import to_json
from cohort.rewards.travel.prompt import messages, prompt_text
from cohort.rewards.travel.query import Query
from cohort.rewards.travel.scores import MAX_TOTAL, evaluate
from cohort.rewards.travel.solver import cheapest

QUERIES = [make_query(21, level, "train", index) for level in LEVELS for index in range(12)]
Days = list[dict[str, Any]]


def honest(query: Query) -> Days:
    solution = cheapest(query)
    assert solution is not None
    days: Days = json.loads(to_json(solution.plan))["days"]
    return days


def total(query: Query, days: Any) -> float:
    return evaluate(query, json.dumps({"days": days})).total


def partial(query: Query) -> float:
    """The score of the honest plan with its last meal missing."""
    days = honest(query)
    days[-1]["meals"].pop()
    return total(query, days)


def spray_day(query: Query, days: Days) -> Days:
    """Everything that the city of each day has."""
    for day in days:
        city = query.country.city(day["city"])
        day["meals"] = [item.name for item in city.restaurants]
        day["sights"] = [item.name for item in city.sights]
    return days


def spray_trip(query: Query, days: Days) -> Days:
    """Everything that there is, every day."""
    cities = query.country.cities
    for day in days:
        day["meals"] = [item.name for city in cities for item in city.restaurants]
        day["sights"] = [item.name for city in cities for item in city.sights]
    return days


def spray_days(query: Query, days: Days) -> Days:
    return spray_trip(query, days) * 5


def without(*keys: str) -> Callable[[Query, Days], Days]:
    def change(_: Query, days: Days) -> Days:
        for day in days:
            for key in keys:
                if key in day:
                    day[key] = [] if key in ("meals", "sights") else None
        return days

    return change


def cities_only(query: Query, _: Days) -> Days:
    city = query.country.cities[0].name
    return [{"city": city, "meals": [], "sights": []}] * query.days


def invented(query: Query, _: Days) -> Days:
    """A plan of the right shape with names that do not exist."""
    names = [f"place {number}" for number in range(query.meals_per_day)]
    return [
        {"city": "Nowhere", "hotel": "x", "meals": names, "sights": [f"sight {number}"]}
        for number in range(query.days)
    ]


def same_day(_: Query, days: Days) -> Days:
    return [days[0]] * len(days)


def same_day_in_disguise(_: Query, days: Days) -> Days:
    """The first day again and again, with other case, width and spaces."""
    styles: list[Callable[[str], str]] = [
        str.upper,
        str.lower,
        lambda name: f"  {name.replace(' ', '   ')} ",
        lambda name: "".join(chr(ord(c) + 0xFEE0) if "!" <= c <= "~" else c for c in name),
    ]
    return [
        days[0] | {key: [style(name) for name in days[0][key]] for key in ("meals", "sights")}
        for style, _ in zip(styles * 2, days, strict=False)
    ]


HOSTILE: list[Callable[[Query, Days], Days]] = [
    spray_day,
    spray_trip,
    spray_days,
    without("meals"),
    without("meals", "sights"),
    without("meals", "sights", "hotel", "travel"),
    cities_only,
    invented,
]
# These need more than one day to be another plan at all.
HOSTILE_IN_DAYS: list[Callable[[Query, Days], Days]] = [
    same_day,
    same_day_in_disguise,
    lambda _, days: days[:1],
    lambda _, days: days[-1:],
]


@pytest.mark.parametrize("game", range(len(HOSTILE)))
def test_gaming_does_not_pay(game: int) -> None:
    for query in QUERIES:
        found = total(query, HOSTILE[game](query, honest(query)))
        assert found <= partial(query) < 1


@pytest.mark.parametrize("game", range(len(HOSTILE_IN_DAYS)))
def test_gaming_the_days_does_not_pay(game: int) -> None:
    for query in QUERIES:
        if query.days > 1:
            found = total(query, HOSTILE_IN_DAYS[game](query, honest(query)))
            assert found <= partial(query) < 1


def test_extra_days_do_not_pay() -> None:
    for query in QUERIES:
        days = honest(query)
        assert total(query, [*days, days[-1]]) < 0.5


def test_a_plan_that_books_nothing_earns_its_schema_only() -> None:
    for query in QUERIES:
        assert total(query, cities_only(query, [])) == 0.125
        assert total(query, invented(query, [])) == 0.125
        found = evaluate(query, json.dumps({"days": cities_only(query, [])}))
        # A rule about what is not there has not passed; one city after another is the exception.
        assert not any(finding.passed for finding in (*found.commonsense, *found.hard))


@pytest.mark.parametrize("level", LEVELS)
def test_the_prompt_and_its_own_example_earn_nothing(level: int) -> None:
    query = make_query(0, level, "train", 1)
    assert evaluate(query, prompt_text(query)).total == 0
    assert evaluate(query, messages(query)[0]["content"].split("JSON only: ")[1]).total == 0


def test_better_plans_score_more() -> None:
    """Nothing < shape < gaps < all but the budget < a plan that breaks no rule."""
    for query in QUERIES:
        days = honest(query)
        poor = dataclasses.replace(query, budget=1)
        over = total(poor, days)
        assert 0 < total(query, invented(query, [])) < partial(query) < over < 1
        assert total(query, days) >= 1


def junk(rng: random.Random, names: list[str], depth: int = 0) -> Any:
    kinds = ["name", "number", "none", "bool", "text"] + ["list", "dict"] * (depth < 4)
    match rng.choice(kinds):
        case "name":
            return rng.choice(names)
        case "number":
            return rng.choice([0, -1, 1e308, -0.5, 10**30, float("nan"), float("inf")])
        case "none":
            return None
        case "bool":
            return rng.random() < 0.5
        case "text":
            return "".join(chr(rng.randrange(1, 0xD7FF)) for _ in range(rng.randint(0, 8)))
        case "list":
            return [junk(rng, names, depth + 1) for _ in range(rng.randint(0, 4))]
        case _:
            keys = ["days", "city", "meals", "sights", "hotel", "travel", "cost"]
            chosen = rng.sample(keys, rng.randint(0, 5))
            return {key: junk(rng, names, depth + 1) for key in chosen}


def test_any_json_is_scored_within_bounds() -> None:
    rng = random.Random(0)
    query = make_query(21, 3, "train", 0)
    days = honest(query)
    names = [item.name for city in query.country.cities for item in (city, *city.sights)]
    for _ in range(1500):
        value: Any = {"days": [dict(day) for day in days]}
        day = rng.choice(value["days"])
        day[rng.choice(["city", "meals", "sights", "hotel", "travel"])] = junk(rng, names)
        for text in (json.dumps(value), json.dumps(junk(rng, names))):
            found = evaluate(query, text)
            assert 0 <= found.total <= MAX_TOTAL
            assert (found.total >= 1) == found.passed


def test_any_text_is_scored() -> None:
    rng = random.Random(1)
    query = make_query(21, 2, "train", 0)
    text = json.dumps({"days": honest(query)})
    for _ in range(1500):
        start = rng.randrange(len(text))
        cut = text[:start] + rng.choice(["", "}", "{", '"', ",", "\\u", "\x00"]) + text[start + 1 :]
        found = evaluate(query, cut)
        assert 0 <= found.total <= MAX_TOTAL
