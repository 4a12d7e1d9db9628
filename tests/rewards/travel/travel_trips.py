"""A world made by hand in which every rule applies, and a plan that keeps them all."""

from __future__ import annotations

import copy
import json
from typing import Any

from cohort.rewards.travel.query import Query
from cohort.rewards.travel.scores import Evaluation, evaluate
from cohort.rewards.travel.world import City, Country, Hotel, Leg, Restaurant, Sight

ALBA = City(
    "Alba",
    (
        Hotel("Alba Inn", "Alba", 100),
        Hotel("Alba Barn", "Alba", 20, "shared"),
        Hotel("Alba Rooms", "Alba", 30, "private", ("pets",)),
        Hotel("Alba Lodge", "Alba", 40, "private", ("smoking",), 3),
        Hotel("Alba Grand", "Alba", 900),
    ),
    (
        Restaurant("Alba Cup", "Alba", 10, ("Thai",)),
        Restaurant("Alba Fork", "Alba", 12, ("Greek",)),
        Restaurant("Alba Spoon", "Alba", 14, ("Greek",)),
    ),
    (
        Sight("Alba Temple", "Alba", 8, ("temple",)),
        Sight("Alba Park", "Alba", 0, ("garden", "nature")),
        Sight("Alba Museum", "Alba", 9, ("museum",), closed=(0, 1)),
    ),
)
BERN = City(
    "Bern",
    (Hotel("Bern Inn", "Bern", 90), Hotel("Bern Lodge", "Bern", 70, "private", (), 2)),
    (
        Restaurant("Bern Cup", "Bern", 11, ("Greek",)),
        Restaurant("Bern Fork", "Bern", 13, ("Indian",)),
        Restaurant("Bern Spoon", "Bern", 15, ("Thai",)),
    ),
    (
        Sight("Bern Castle", "Bern", 12, ("castle",)),
        Sight("Bern Temple", "Bern", 6, ("temple",)),
        Sight("Bern Garden", "Bern", 5, ("garden",), closed=(3,)),
    ),
)
LEGS = (
    Leg(("Alba", "Bern"), "train", 30),
    Leg(("Alba", "Bern"), "bus", 10),
    Leg(("Alba", "Bern"), "car", 25),
)
# Four days from Monday for two people: one room, everything else twice.
QUERY = Query(
    country=Country("Testland", (ALBA, BERN), LEGS),
    days=4,
    party=2,
    budget=600,
    interests=("temple", "garden"),
    cities=("Alba", "Bern"),
    start="Alba",
    room="private",
    house_rule="pets",
    cuisines=("Thai",),
    avoid="bus",
)
PLAN: dict[str, Any] = {
    "days": [
        {"city": "Alba", "hotel": "Alba Inn", "meals": ["Alba Cup"], "sights": ["Alba Temple"]},
        {"city": "Alba", "hotel": "Alba Inn", "meals": ["Alba Fork"], "sights": ["Alba Park"]},
        {
            "city": "Bern",
            "travel": "train",
            "hotel": "Bern Inn",
            "meals": ["Bern Cup"],
            "sights": ["Bern Castle"],
        },
        {"city": "Bern", "meals": ["Bern Fork"], "sights": ["Bern Temple"]},
    ]
}
# 290 for the nights, twice (46 for meals, 26 for sights, 30 for the train).
COST = 290 + 2 * (10 + 12 + 11 + 13 + 8 + 0 + 12 + 6 + 30)


def plan() -> dict[str, Any]:
    return copy.deepcopy(PLAN)


def evaluated(value: Any, query: Query = QUERY) -> Evaluation:
    return evaluate(query, value if isinstance(value, str) else json.dumps(value))


def failed(evaluation: Evaluation) -> set[str]:
    findings = (*evaluation.commonsense, *evaluation.hard)
    return {finding.rule for finding in findings if not finding.passed}
