"""The format: what is read, and what is a clear error."""

from __future__ import annotations

import json
import time

import pytest
from travel_trips import PLAN, evaluated

from cohort.rewards.travel.plan import Day, Plan, PlanError, parse_plan, to_json

DAY = '{"city":"A","meals":["m"],"sights":["s"]}'
TEXT = f'{{"days":[{DAY}]}}'
PARSED = Plan((Day("A", ("m",), ("s",)),))


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        f"  \n{TEXT}\n",
        f"Here is your trip:\n```json\n{TEXT}\n```\nEnjoy!",
        f"{TEXT} {TEXT}",
        f"{TEXT} and then {{broken",
        f"<think>{{maybe}} </think>{TEXT}",
        TEXT.replace('"city"', '"hotel":null,"travel":null,"city"'),
        TEXT.replace('"city"', '"hotel":"","travel":"","city"'),
    ],
)
def test_the_first_object_is_read(text: str) -> None:
    assert parse_plan(text) == PARSED


def test_there_and_back() -> None:
    parsed = parse_plan(json.dumps(PLAN))
    assert parse_plan(to_json(parsed)) == parsed
    assert json.loads(to_json(parsed)) == PLAN


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no JSON object"),
        ("Visit Kyoto, then Nara.", "no JSON object"),
        ("[1, 2]", "no JSON object"),
        ("<think>" + TEXT + "</think>", "no JSON object"),
        ("{city} " + TEXT, "no valid JSON"),
        (TEXT[:-2], "no valid JSON"),
        ("{}", "the plan has no 'days'"),
        ('{"days":[]}', "at least one day"),
        ('{"days":{}}', "at least one day"),
        ('{"days":null}', "at least one day"),
        ('{"days":[1]}', "day 1 must be an object, not a int"),
        ('{"days":[[]]}', "day 1 must be an object, not a list"),
        ('{"days":[' + DAY + ',{"city":"A"}]}', "day 2 has no 'meals'"),
        (TEXT.replace('"A"', "7"), "day 1: 'city' must be a name, not a int"),
        (TEXT.replace('"A"', "null"), "'city' must be a name"),
        (TEXT.replace('"A"', '" "'), "'city' is empty"),
        (TEXT.replace('["m"]', '"m"'), "'meals' must be a list of names, not a str"),
        (TEXT.replace('["m"]', "-3"), "'meals' must be a list of names, not a int"),
        (TEXT.replace('["m"]', '[["m"]]'), "'meals' must be a name, not a list"),
        (TEXT.replace('["s"]', "[true]"), "'sights' must be a name, not a bool"),
        (TEXT.replace('["s"]', "[NaN]"), "NaN is not JSON"),
        (TEXT.replace('["s"]', "[-Infinity]"), "-Infinity is not JSON"),
        (TEXT.replace('["s"]', f"[{'9' * 5000}]"), "no valid JSON"),
        (TEXT.replace('"city"', '"hotel":-5,"city"'), "'hotel' must be a name, not a int"),
        (TEXT.replace('"city"', '"cost":1,"city"'), "day 1 has an unknown key 'cost'"),
        ('{"cost":"-999",' + TEXT[1:], "the plan has an unknown key 'cost'"),
        ('{"days":[],' + TEXT[1:], "a key is given twice"),
        (TEXT.replace('"city"', '"city":"B","city"'), "a key is given twice"),
        (TEXT.replace('"m"', ",".join(['"m"'] * 51)), "51 entries, more than 50"),
        (TEXT.replace('"m"', '"' + "m" * 201 + '"'), "more than 200 characters"),
        (f'{{"days":[{",".join([DAY] * 61)}]}}', "61 entries, more than 60"),
        ('{"days":' + "[" * 15_000, "nested too deeply|no valid JSON"),
        ('{"days":' * 2_000 + "1" + "}" * 2_000, "nested too deeply|must be a list"),
    ],
)
def test_everything_else_is_a_clear_error(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        parse_plan(text)
    found = evaluated(text)
    assert (found.total, found.cost, found.delivered) == (0, None, False)


@pytest.mark.parametrize(
    "text",
    [
        "x" * 1_000_000,
        "{" * 1_000_000,
        '{"days":[' + ",".join([DAY] * 25_000) + "]}",
        '{"days":[' + "[" * 1_000_000,
        '{"' + "a" * 1_000_000 + '":1}',
        "</think>" * 125_000,
        '{"days":' + "9" * 1_000_000 + "}",
    ],
)
def test_a_megabyte_is_an_error_in_no_time(text: str) -> None:
    start = time.perf_counter()
    assert evaluated(text).total == 0
    assert time.perf_counter() - start < 0.2


def test_a_lone_surrogate_is_only_an_unknown_name() -> None:
    found = evaluated(TEXT.replace('"A"', r'"\ud800"'))
    assert found.delivered and not found.passed
    assert all(finding.problem.isascii() for finding in found.commonsense)
