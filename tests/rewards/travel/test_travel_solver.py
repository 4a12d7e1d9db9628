"""The solver against the validator, on many queries, and against brute force, on tiny ones."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from collections.abc import Iterator

import pytest
from travel_trips import COST, QUERY, evaluated, failed

from cohort.rewards.tasks import Demonstrates
from cohort.rewards.travel.demonstrations import varied_plan
from cohort.rewards.travel.generate import LEVELS, make_query
from cohort.rewards.travel.plan import Day, Plan, to_json
from cohort.rewards.travel.query import Query, from_columns, to_columns
from cohort.rewards.travel.scores import evaluate
from cohort.rewards.travel.solver import cheapest, routes
from cohort.rewards.travel.task import TravelTask
from cohort.rewards.travel.world import Sizes, make_world
from tests.pace import some

COUNTS = [40, pytest.param(200, marks=pytest.mark.exhaustive)]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("level", LEVELS)
def test_every_query_has_a_plan_that_breaks_no_rule(level: int, count: int) -> None:
    low, high = LEVELS[level].slack
    for index in range(count):
        query = make_query(11, level, "eval" if index % 4 == 0 else "train", index)
        solution = cheapest(query)
        assert solution is not None
        found = evaluate(query, to_json(solution.plan))
        assert found.passed, failed(found)
        assert found.cost == solution.cost <= query.budget
        assert found.total >= 1
        # The budget is the optimum with the level's slack, rounded up by less than ten dollars.
        assert solution.cost * (1 + low) <= query.budget < solution.cost * (1 + high) + 10
        plan = varied_plan(query, random.Random(index))
        assert evaluate(query, to_json(plan)).passed


@pytest.mark.parametrize("level", LEVELS)
def test_one_dollar_less_than_the_optimum_is_refused(level: int) -> None:
    for index in range(20):
        query = make_query(5, level, "train", index)
        solution = cheapest(query)
        assert solution is not None
        short = dataclasses.replace(query, budget=solution.cost - 1)
        assert failed(evaluate(short, to_json(solution.plan))) == {"budget"}
        with pytest.raises(ValueError, match="no plan for"):
            varied_plan(short, random.Random(0))


def test_the_cheapest_plan_of_the_world_made_by_hand() -> None:
    solution = cheapest(QUERY)
    assert solution is not None
    # Three nights in Alba Lodge, all of Alba's meals and sights (the museum on the Wednesday), and
    # by car to Bern, where the garden is closed on the Thursday.
    assert solution.cost == 120 + 2 * (10 + 12 + 14 + 8 + 0 + 9 + 25 + 11 + 6) < COST
    assert evaluated(to_json(solution.plan)).passed


def all_plans(query: Query) -> Iterator[Plan]:
    """Every plan that could break no rule, found without the solver; some do break one."""
    modes = [None, *sorted({leg.mode for leg in query.country.legs})]
    choices: list[list[Day]] = []
    for number in range(query.days):
        days = []
        for city in query.country.cities:
            hotels = [hotel.name for hotel in city.hotels] if number < query.days - 1 else [None]
            meals = itertools.permutations([r.name for r in city.restaurants], query.meals_per_day)
            sights = [
                chosen
                for count in range(1, query.max_sights + 1)
                for chosen in itertools.combinations([s.name for s in city.sights], count)
            ]
            ways = modes if number else [None]
            for hotel, meal, sight, way in itertools.product(hotels, meals, sights, ways):
                days.append(Day(city.name, meal, sight, hotel, way))
        choices.append(days)
    return (Plan(days) for days in itertools.product(*choices))


def tiny(seed: int, names: tuple[str, ...], sizes: Sizes, days: int) -> Query:
    rng = random.Random(seed)
    country = make_world(seed, sizes, ("Japan",)).country("Japan").only(names)
    cuisines = sorted({c for city in country.cities for r in city.restaurants for c in r.cuisines})
    return Query(
        country=country,
        days=days,
        party=rng.randint(1, 3),
        budget=10_000,
        interests=("culture", rng.choice(["garden", "market", "nature"])),
        max_sights=2 if days == 2 else 1,
        first_weekday=rng.randrange(7),
        cities=tuple(names) if rng.random() < 0.5 else names[:1],
        room=rng.choice([None, country.cities[0].hotels[0].room]),
        house_rule=rng.choice([None, "pets"]),
        cuisines=rng.choice([(), (rng.choice(cuisines),)]),
        avoid=rng.choice([None, "bus"]),
    )


@pytest.mark.parametrize(
    "query",
    [
        *some([tiny(seed, ("Kyoto", "Nara"), Sizes(2, 2, 3), 2) for seed in range(6)], 6),
        *some([tiny(seed, ("Osaka",), Sizes(2, 3, 4), 3) for seed in range(4)], 4),
        *some([tiny(seed, ("Kyoto", "Nara", "Osaka"), Sizes(1, 1, 1), 3) for seed in range(4)], 4),
    ],
)
def test_optimum_against_brute_force(query: Query) -> None:
    found = [evaluate(query, to_json(plan)) for plan in all_plans(query)]
    costs = [item.cost for item in found if item.passed and item.cost is not None]
    solution = cheapest(query)
    assert (solution and solution.cost) == min(costs, default=None)


def test_brute_force_sees_feasible_and_infeasible_queries() -> None:
    queries = [tiny(seed, ("Kyoto", "Nara"), Sizes(2, 2, 3), 2) for seed in range(6)]
    feasible = [cheapest(query) is not None for query in queries]
    assert any(feasible)
    assert not all(
        cheapest(tiny(seed, ("Kyoto", "Nara", "Osaka"), Sizes(1, 1, 1), 3)) for seed in range(4)
    )


def test_routes() -> None:
    query = dataclasses.replace(QUERY, start=None)
    assert set(routes(query)) == {
        ((a, days), (b, 4 - days))
        for a, b in (("Alba", "Bern"), ("Bern", "Alba"))
        for days in (1, 2, 3)
    }
    anywhere = dataclasses.replace(QUERY, cities=())
    assert set(routes(anywhere)) == {(("Alba", 4),)} | {
        (("Alba", days), ("Bern", 4 - days)) for days in (1, 2, 3)
    }


@pytest.mark.parametrize("level", LEVELS)
def test_demonstrations_pass_and_vary(level: int) -> None:
    task = TravelTask(seed=3, level=level, train_size=6, eval_size=2)
    assert isinstance(task, Demonstrates)
    for row in [task.train_row(index) for index in range(6)] + [task.eval_row(0)]:
        shown = [task.demonstration(row, epoch) for epoch in range(4)]
        query = from_columns(row.columns["query"])
        assert all(evaluate(query, text).passed for text in shown)
        # Four plans for a query, and never the same one every time.
        assert len(set(shown)) > 1
        again = TravelTask(seed=3, level=level)
        assert [again.demonstration(row, epoch) for epoch in range(4)] == shown


@pytest.mark.parametrize("level", LEVELS)
def test_columns_there_and_back(level: int) -> None:
    query = make_query(1, level, "train", 0)
    columns = to_columns(query)
    assert json.loads(json.dumps(columns)) == columns
    assert from_columns(columns) == query
