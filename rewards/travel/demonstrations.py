"""Plans to learn from before reinforcement: right, but not always the same one or the best."""

from __future__ import annotations

import dataclasses
import random

from cohort.rewards.travel.booking import book, cost
from cohort.rewards.travel.plan import Day, Plan
from cohort.rewards.travel.query import Query, matches
from cohort.rewards.travel.solver import cheapest
from cohort.rewards.travel.world import City, Country, Sight

# How much a price may be off, in dollars, when a plan is sought: the first that fits the budget.
NOISE = (200, 100, 50, 20, 5, 0)


def varied_plan(query: Query, rng: random.Random) -> Plan:
    """A random plan that breaks no rule: the cheapest one at wrong prices, with added sights.

    Args:
        query: The customer's.
        rng: Decides which plan.

    Raises:
        ValueError: The query has no plan within its budget.
    """
    for noise in NOISE:
        solution = cheapest(_with_noise(query, rng, noise))
        if solution is not None and cost(query, book(query, solution.plan)) <= query.budget:
            return _with_more_sights(query, solution.plan, rng)
    raise ValueError(f"the query has no plan for ${query.budget}")


def _with_noise(query: Query, rng: random.Random, noise: int) -> Query:
    def off(price: int) -> int:
        return price + rng.randint(0, noise)

    def city(item: City) -> City:
        return City(
            item.name,
            tuple(dataclasses.replace(hotel, price=off(hotel.price)) for hotel in item.hotels),
            tuple(dataclasses.replace(meal, price=off(meal.price)) for meal in item.restaurants),
            tuple(dataclasses.replace(sight, price=off(sight.price)) for sight in item.sights),
        )

    country = query.country
    legs = tuple(dataclasses.replace(leg, price=off(leg.price)) for leg in country.legs)
    noisy = Country(country.name, tuple(city(item) for item in country.cities), legs)
    return dataclasses.replace(query, country=noisy)


def _with_more_sights(query: Query, plan: Plan, rng: random.Random) -> Plan:
    """The plan with sights added where the day and the budget have room, interests first."""
    days = list(plan.days)
    used = {name for day in days for name in day.sights}
    left = query.budget - cost(query, book(query, plan))
    for number in rng.sample(range(len(days)), len(days)):
        for _ in range(rng.randint(0, query.max_sights - 1)):
            open_now = [
                sight
                for sight in query.country.city(days[number].city).sights
                if sight.name not in used
                and query.weekday(number) not in sight.closed
                and query.party * sight.price <= left
            ]
            if open_now:
                sight = _preferred(query, open_now, rng)
                used.add(sight.name)
                left -= query.party * sight.price
                days[number] = _with_sight(days[number], sight)
    return Plan(tuple(days))


def _preferred(query: Query, sights: list[Sight], rng: random.Random) -> Sight:
    liked = [s for s in sights if any(matches(s, interest) for interest in query.interests)]
    return rng.choice(liked or sights)


def _with_sight(day: Day, sight: Sight) -> Day:
    return dataclasses.replace(day, sights=(*day.sights, sight.name))
