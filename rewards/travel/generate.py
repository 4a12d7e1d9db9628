"""Queries of five levels, each proven feasible, with a budget drawn from the exact optimum."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from dataclasses import dataclass
from typing import Literal

from cohort.actors.records import derive_seed
from cohort.rewards.travel.places import BANS, PLACES, TAGS
from cohort.rewards.travel.prompt import WORDINGS
from cohort.rewards.travel.query import Query, QueryError, matches, to_columns
from cohort.rewards.travel.solver import Solution, cheapest
from cohort.rewards.travel.world import DEFAULT_SIZES, Country, Sizes, make_world

Split = Literal["train", "eval"]
HOLD_OUT_EVERY = 5
MAX_ATTEMPTS = 1000


@dataclass(frozen=True)
class Level:
    """How hard a query is; pairs are the least and the most.

    Attributes:
        cities: In the tables.
        days: Of the trip.
        party: Persons.
        sizes: What there is in a city.
        interests: How many.
        required: Cities that must be visited.
        meals_per_day: Meals of each day.
        max_sights: Of one day.
        wishes: Of room type, house rule, cuisine, mode to avoid and first city.
        slack: What the budget has over the least possible cost, as a fraction of it.
    """

    cities: int
    days: tuple[int, int]
    party: tuple[int, int]
    sizes: Sizes
    interests: tuple[int, int] = (1, 1)
    required: int = 0
    meals_per_day: int = 1
    max_sights: int = 2
    wishes: tuple[int, int] = (0, 0)
    slack: tuple[float, float] = (0.2, 0.5)


LEVELS: dict[int, Level] = {
    1: Level(1, (1, 2), (1, 1), Sizes(3, 4, 4, plain=True), slack=(0.2, 0.6)),
    2: Level(1, (2, 3), (1, 2), Sizes(3, 5, 5), wishes=(0, 1), slack=(0.2, 0.5)),
    3: Level(2, (3, 3), (1, 2), Sizes(3, 5, 5), (1, 2), 2, 1, 2, (0, 2), (0.15, 0.4)),
    4: Level(3, (4, 4), (1, 3), Sizes(3, 6, 5), (1, 2), 2, 2, 2, (1, 2), (0.1, 0.3)),
    5: Level(4, (5, 5), (1, 4), Sizes(4, 7, 6), (1, 3), 2, 2, 3, (1, 3), (0.05, 0.25)),
}


def make_query(seed: int, level: int, split: Split, index: int) -> Query:
    """Query `index` of a split: a pure function of its arguments.

    A query belongs to one split by its content, whatever the seed and the wording, so no training
    query of any seed is held out under another.

    Args:
        seed: The run's.
        level: 1 to 5.
        split: "train" or "eval".
        index: From 0.

    Raises:
        QueryError: A level that does not exist.
    """
    shape = _level(level)
    for attempt in range(MAX_ATTEMPTS):
        key = derive_seed(seed, "travel", level, split, index, attempt)
        query = _draw(random.Random(key), key, shape, level)
        if query is not None and split_of(query) == split:
            return query
    raise QueryError(f"no query of level {level} in {MAX_ATTEMPTS} attempts")


def split_of(query: Query) -> Split:
    """The split of a query: a fifth of all is held out, by a hash of all but the wording."""
    content = json.dumps(to_columns(dataclasses.replace(query, wording=0)), sort_keys=True)
    digest = hashlib.blake2b(content.encode(), digest_size=8).digest()
    return "eval" if int.from_bytes(digest, "big") % HOLD_OUT_EVERY == 0 else "train"


def trip(
    country: str,
    cities: tuple[str, ...],
    days: int,
    budget: int,
    interests: tuple[str, ...] = ("culture",),
    party: int = 1,
    seed: int = 0,
) -> Query:
    """A query over a seeded world of a country: the required cities and two others.

    Args:
        country: One of places.PLACES.
        cities: That must be visited.
        days: Of the trip.
        budget: Dollars for the whole party.
        interests: Tags of sights, or "culture".
        party: Persons.
        seed: Of the world.

    Raises:
        QueryError: A country, city or interest that does not exist, or a trip that is impossible
            for the budget (with the least that is possible).
    """
    if country not in PLACES:
        raise QueryError(f"country {country!r} is unknown; there are {', '.join(PLACES)}")
    known = PLACES[country].cities
    for city in cities:
        if city not in known:
            raise QueryError(f"cities: {city!r} is not in {country}; it has {', '.join(known)}")
    for interest in interests:
        if interest not in ("culture", *TAGS):
            raise QueryError(f"interests: {interest!r} is not one of culture, {', '.join(TAGS)}")
    if days < 1 or party < 1 or not interests:
        raise QueryError("days and party must be at least 1, and interests not empty")
    others = [city for city in known if city not in cities][:2]
    world = make_world(seed, DEFAULT_SIZES, (country,)).country(country)
    query = Query(world.only([*cities, *others]), days, party, budget, interests, 2, 3, 0, cities)
    solution = cheapest(query)
    if solution is None:
        raise QueryError(f"no plan of {days} days visits {', '.join(cities)}: ask for other days")
    if solution.cost > budget:
        raise QueryError(f"budget {budget} is too small: the cheapest plan costs {solution.cost}")
    return query


def _level(level: int) -> Level:
    if level not in LEVELS or isinstance(level, bool):
        raise QueryError(f"level must be one of {', '.join(map(str, LEVELS))}, got {level!r}")
    return LEVELS[level]


def _draw(rng: random.Random, seed: int, shape: Level, level: int) -> Query | None:
    """A random query, or None for one that has no plan."""
    name = rng.choice(list(PLACES))
    names = rng.sample(list(PLACES[name].cities), shape.cities)
    country = make_world(seed, shape.sizes, (name,)).country(name).only(names)
    required = tuple(sorted(rng.sample(names, shape.required)))
    query = Query(
        country=country,
        days=rng.randint(*shape.days),
        party=rng.randint(*shape.party),
        budget=0,
        interests=_interests(rng, country, rng.randint(*shape.interests)),
        meals_per_day=shape.meals_per_day,
        max_sights=shape.max_sights,
        first_weekday=rng.randrange(7),
        cities=required,
        level=level,
        wording=rng.randrange(WORDINGS),
    )
    query = _with_wishes(rng, query, rng.randint(*shape.wishes))
    solution = cheapest(query)
    if solution is None:
        return None
    return dataclasses.replace(query, budget=_budget(rng, solution, shape))


def _interests(rng: random.Random, country: Country, count: int) -> tuple[str, ...]:
    """Different interests that the country's sights can serve."""
    sights = [sight for city in country.cities for sight in city.sights]
    served = [tag for tag in ("culture", *TAGS) if any(matches(sight, tag) for sight in sights)]
    return tuple(rng.sample(served, min(count, len(served))))


def _with_wishes(rng: random.Random, query: Query, count: int) -> Query:
    country = query.country
    hotels = [hotel for city in country.cities for hotel in city.hotels]
    modes = sorted({leg.mode for leg in country.legs})
    cuisines = sorted({c for city in country.cities for r in city.restaurants for c in r.cuisines})
    kinds = ["room", "house_rule", "cuisines"] + (["avoid", "start"] if modes else [])
    for kind in rng.sample(kinds, count):
        match kind:
            case "room":
                query = dataclasses.replace(query, room=rng.choice(hotels).room)
            case "house_rule":
                query = dataclasses.replace(query, house_rule=rng.choice(BANS))
            case "cuisines":
                query = dataclasses.replace(query, cuisines=(rng.choice(cuisines),))
            case "avoid":
                query = dataclasses.replace(query, avoid=rng.choice(modes))
            case "start":
                query = dataclasses.replace(query, start=rng.choice(query.cities))
    return query


def _budget(rng: random.Random, solution: Solution, shape: Level) -> int:
    """The least cost and the level's slack, rounded up: to 5 dollars from 100 on, 10 from 500."""
    wanted = solution.cost * (1 + rng.uniform(*shape.slack))
    step = 1 if wanted < 100 else 5 if wanted < 500 else 10
    return -int(-wanted // step) * step
