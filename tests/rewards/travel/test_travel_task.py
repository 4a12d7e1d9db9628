"""The world, the queries in words, the task and its reward functions."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from travel_trips import PLAN, QUERY, evaluated

from cohort.actors.records import Completion, Group, Prompt
from cohort.rewards.base import load_function, score_group
from cohort.rewards.config import RewardsConfig, TaskConfig
from cohort.rewards.tasks import Task, TaskError, load_task, sample_rows
from cohort.rewards.travel import reward
from cohort.rewards.travel.generate import LEVELS, make_query, split_of, trip
from cohort.rewards.travel.places import PLACES, TAGS
from cohort.rewards.travel.plan import to_json
from cohort.rewards.travel.prompt import INTERESTS, prompt_text, sentence
from cohort.rewards.travel.query import QueryError, from_columns, to_columns
from cohort.rewards.travel.scores import Soft, travelplanner_metrics
from cohort.rewards.travel.solver import cheapest
from cohort.rewards.travel.task import TravelTask
from cohort.rewards.travel.world import DEFAULT_SIZES, Sizes, make_world

ROOT = Path(__file__).parents[3]

# the world


def test_the_places_are_well_formed() -> None:
    assert len(PLACES) >= 5
    for places in PLACES.values():
        names = [name for sights in places.cities.values() for name, _ in sights]
        assert len(places.cities) == 5
        assert len(names) == len(set(names)) == 35
        assert all(name.isascii() and len(name) <= 20 for name in names)
        assert {tag for s in places.cities.values() for _, tags in s for tag in tags} <= {*TAGS}


def test_a_world_is_a_function_of_its_seed() -> None:
    world = make_world(1)
    assert world == make_world(1) != make_world(2)
    assert [country.name for country in world.countries] == list(PLACES)
    assert make_world(1, DEFAULT_SIZES, ("Spain",)).countries == (world.country("Spain"),)


def test_a_world_is_sane() -> None:
    for country in make_world(3, Sizes(4, 7, 6)).countries:
        names = [c.name for c in country.cities]
        for city in country.cities:
            items = (*city.hotels, *city.restaurants, *city.sights)
            assert (len(city.hotels), len(city.restaurants), len(city.sights)) == (4, 7, 6)
            assert all(item.city == city.name and item.price >= 0 for item in items)
            names += [item.name for item in items]
        assert len(names) == len({name.casefold() for name in names})
        pairs = {leg.cities for leg in country.legs}
        assert len(pairs) == 10
        assert len({(leg.cities, leg.mode) for leg in country.legs}) == len(country.legs)


def test_a_world_larger_than_its_names() -> None:
    with pytest.raises(ValueError, match="sights, 9 are wanted"):
        make_world(0, Sizes(sights=9))
    with pytest.raises(ValueError, match="unknown country 'Atlantis'"):
        make_world(0, DEFAULT_SIZES, ("Atlantis",))


# the words


@pytest.mark.parametrize("level", LEVELS)
def test_all_that_is_asked_and_offered_is_in_the_prompt(level: int) -> None:
    for index in range(40):
        query = make_query(9, level, "train", index)
        sent, text = sentence(query), prompt_text(query)
        assert f"${query.budget:,}" in sent
        assert f"{query.days} day" in sent or f"{query.days}-day" in sent
        assert all(INTERESTS[interest] in sent for interest in query.interests)
        assert all(city in sent for city in query.cities)
        wishes = [query.start, query.room, query.house_rule, *query.cuisines, query.avoid]
        assert all(wish in sent for wish in wishes if wish is not None)
        assert query.party == 1 or f"{query.party} people" in sent or f"{query.party} of us" in sent
        for city in query.country.cities:
            hotels = city.hotels if query.days > 1 else ()
            for item in (*hotels, *city.restaurants, *city.sights):
                assert f"{item.name} ${item.price}" in text
        assert all(f"{leg.mode} ${leg.price}" in text for leg in query.country.legs)


def test_the_easiest_level_is_short() -> None:
    # A token of SmolLM2 is about 3 characters here: 256 and 128 tokens have room to spare.
    for index in range(100):
        query = make_query(0, 1, "train", index)
        solution = cheapest(query)
        assert solution is not None
        assert len(prompt_text(query)) < 640
        assert len(to_json(solution.plan)) < 240


def test_wordings_differ_and_cover_the_same_query() -> None:
    levels = [make_query(0, 1, "train", index) for index in range(40)]
    assert {query.wording for query in levels} == {0, 1, 2, 3}


JAPAN = (
    "Plan a 5-day trip to Japan, including Kyoto and Tokyo, focusing on cultural experiences and "
    "staying under $2,000."
)


def test_the_trip_to_japan() -> None:
    query = trip("Japan", ("Kyoto", "Tokyo"), 5, 2000)
    assert sentence(query) == JAPAN
    solution = cheapest(query)
    assert solution is not None
    assert evaluated(to_json(solution.plan), query).passed


def test_an_impossible_trip() -> None:
    with pytest.raises(QueryError, match="country 'Mars'"):
        trip("Mars", (), 2, 100)
    with pytest.raises(QueryError, match="'Rome' is not in Japan"):
        trip("Japan", ("Rome",), 2, 100)
    with pytest.raises(QueryError, match="interests: 'golf'"):
        trip("Japan", ("Kyoto",), 2, 1000, ("golf",))
    with pytest.raises(QueryError, match=r"budget 10 is too small: the cheapest plan costs \d+"):
        trip("Japan", ("Kyoto",), 2, 10)
    with pytest.raises(QueryError, match="no plan of 1 days"):
        trip("Japan", ("Kyoto", "Tokyo"), 1, 5000)


# the task


def make_task(**options: Any) -> Task:
    config = TaskConfig(name="cohort.rewards.travel.task:TravelTask", options=options)
    return load_task(config, seed=0)


@pytest.mark.parametrize("level", LEVELS)
def test_rows(level: int) -> None:
    task = make_task(level=level, train_size=30, eval_size=10)
    assert (task.train_size(), task.eval_size()) == (30, 10)
    rows = [task.train_row(index) for index in range(30)]
    held_out = [task.eval_row(index) for index in range(10)]
    assert rows == [make_task(level=level).train_row(index) for index in range(30)]
    assert len({row.id for row in rows}) == 30
    assert len({json.dumps(row.content) for row in rows + held_out}) == 40
    for row in rows + held_out:
        assert json.loads(json.dumps(row.columns)) == row.columns
        assert row.columns["query"]["level"] == level
    assert len(sample_rows(task, 0, 20, 20)) == 20
    with pytest.raises(IndexError):
        task.train_row(30)


def test_no_training_query_of_any_seed_is_held_out_under_another() -> None:
    for seed in range(3):
        task = TravelTask(seed, level=1, train_size=100, eval_size=50)
        for index in range(50):
            assert split_of(from_columns(task.train_row(index).columns["query"])) == "train"
            assert split_of(from_columns(task.eval_row(index).columns["query"])) == "eval"


def test_another_wording_does_not_change_the_split_of_a_query() -> None:
    for index in range(20):
        query = make_query(0, 1, "eval", index)
        for wording in range(4):
            assert split_of(dataclasses.replace(query, wording=wording)) == "eval"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": 0}, r"task\.options\.level must be 1 to 5, got 0"),
        ({"level": "1"}, r"task\.options\.level"),
        ({"level": True}, r"task\.options\.level"),
        ({"level": [1]}, r"task\.options\.level"),
        ({"train_size": 0}, r"task\.options\.train_size must be a whole number from 1 on, got 0"),
        ({"eval_size": 1.5}, r"task\.options\.eval_size"),
        ({"levle": 1}, r"task\.options\.levle: unknown option.*level"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TaskError, match=message):
        make_task(**options)


# the reward functions


def test_the_reward_of_the_task_scores_a_group_and_logs_its_parts() -> None:
    task = make_task(level=2)
    row = task.train_row(0)
    solution = cheapest(from_columns(row.columns["query"]))
    assert solution is not None
    texts = [to_json(solution.plan), "no plan", '{"days":[{"city":"x","meals":[],"sights":[]}]}']
    completions = tuple(
        Completion(str(n), "p", np.array([1]), np.array([0.0]), "stop", 0, (0, 0), text)
        for n, text in enumerate(texts)
    )
    group = Group("g", Prompt("p", (1,), row.content, row.columns), completions)
    [spec] = task.rewards
    result = score_group(load_function(spec.path), "itinerary", group)
    assert not result.errors
    assert result.values[0] is not None and result.values[0] >= 1
    assert result.values[1:] == (0.0, 0.125)
    parts = result.parts
    assert parts["schema"] == (1.0, 0.0, 1.0)
    assert parts["commonsense"] == parts["hard"] == parts["passed"] == (1.0, 0.0, 0.0)
    assert parts["rule_budget"] == parts["balance"] == (1.0, 0.0, 0.0)
    assert set(parts) >= {"coverage", "culture", "interests"}
    assert RewardsConfig().functions is None


def test_a_row_without_a_query_does_not_apply() -> None:
    columns = [None, to_columns(QUERY)]
    missing, found = reward.itinerary([json.dumps(PLAN)] * 2, columns)
    assert missing is None
    assert found is not None
    assert found["score"] == evaluated(PLAN).total


def test_a_broken_query_is_an_error_of_the_data() -> None:
    with pytest.raises(QueryError, match="does not hold a travel query"):
        reward.itinerary(["{}"], [{"days": 3}])
    with pytest.raises(QueryError, match="does not hold a travel query"):
        reward.itinerary(["{}"], ["text"])  # type: ignore[list-item]


def test_soft_scores_by_hand() -> None:
    # Three sights of culture in four days, of two kinds; a temple, a temple and a garden.
    assert evaluated(PLAN).soft == Soft(0.5 * 3 / 4 + 0.5 * 2 / 4, (1 + 1 / 2) / 2, 1.0)
    more = json.loads(json.dumps(PLAN))
    more["days"][1]["sights"].append("Alba Garden")
    assert evaluated(more).soft == Soft()


def test_the_published_metrics() -> None:
    over = json.loads(json.dumps(PLAN))
    over["days"][0]["hotel"] = "Alba Grand"
    gap = json.loads(json.dumps(PLAN))
    gap["days"][1]["meals"] = []
    found = [evaluated(PLAN), evaluated(over), evaluated(gap), evaluated("nothing")]
    assert travelplanner_metrics(found) == {
        "delivery_rate": 3 / 4,
        "commonsense_micro": (9 + 9 + 8 + 0) / 36,
        "commonsense_macro": 2 / 4,
        "hard_micro": (7 + 6 + 0 + 0) / 28,
        "hard_macro": 1 / 4,
        "final_pass_rate": 1 / 4,
    }
    with pytest.raises(ValueError, match="no evaluations"):
        travelplanner_metrics([])


def test_the_task_reports_the_published_metrics() -> None:
    task = TravelTask(seed=0, level=1)
    rows = [task.eval_row(index) for index in range(4)]
    solutions = [cheapest(from_columns(row.columns["query"])) for row in rows]
    texts = [to_json(solution.plan) for solution in solutions if solution is not None]
    assert task.metrics(rows, texts)["final_pass_rate"] == 1
    assert task.metrics(rows, [*texts[:1], "", "", ""])["final_pass_rate"] == 0.25


# other processes


def in_another_process(code: str, hash_seed: str) -> str:
    environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout


DIGEST = """
import hashlib
from cohort.rewards.travel.generate import LEVELS
from cohort.rewards.travel.task import TravelTask
from cohort.rewards.travel.world import make_world
parts = [repr(make_world(7))]
for level in LEVELS:
    task = TravelTask(7, level)
    rows = [task.train_row(0), task.train_row(1), task.eval_row(0)]
    parts += [repr(rows), *(task.demonstration(row, 1) for row in rows)]
print(hashlib.blake2b("".join(parts).encode()).hexdigest())
"""


def test_the_same_in_every_process() -> None:
    assert len({in_another_process(DIGEST, seed) for seed in ("0", "1", "271828")}) == 1


def test_the_queries_are_pinned() -> None:
    # A change here would break resuming runs of earlier versions.
    row = TravelTask(seed=0).train_row(0)
    assert row.id == "train-1-0"
    assert isinstance(row.content, list)
    assert row.content[0]["content"].splitlines()[0] == (
        "Nice, France, 2 days, 1 person, $220 at most. Interests: ruins."
    )


def test_the_modules_are_light() -> None:
    code = (
        "import sys, cohort.rewards.travel.reward, cohort.rewards.travel.task\n"
        "import cohort.rewards.travel.demonstrations\n"
        "heavy = {'torch', 'vllm', 'ray', 'deepspeed', 'transformers', 'datasets'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    assert in_another_process(code, "0").strip() == "[]"
