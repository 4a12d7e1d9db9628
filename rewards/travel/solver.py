"""Exact search for the cheapest plan of a query.

A plan is a route (which cities, in which order, for how many days) and what is booked on it. Given
the route, hotels, meals, sights and transport do not touch each other except through the budget,
so each is solved on its own and the routes are enumerated. Nothing is approximated:

- Hotels: a stay of n nights costs at least n times its cheapest hotel, and whatever hotel a
  feasible stay uses could be kept for all n nights, so one hotel for each stay is optimal.
- Meals: the asked cuisines are forced in every way, the rest are the cheapest of each city.
- Sights: the days of a stay take different open sights; all assignments are searched.
- Transport: the cheapest way of each leg without a car, or a car for all.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from cohort.rewards.travel.plan import Day, Plan
from cohort.rewards.travel.query import Query
from cohort.rewards.travel.world import Hotel, Leg, Restaurant, Sight

Route = tuple[tuple[str, int], ...]
SightDays = tuple[tuple[Sight, ...], ...]


@dataclass(frozen=True)
class Solution:
    """A plan that breaks no rule other than, maybe, the budget.

    Attributes:
        plan: The plan.
        cost: Dollars.
    """

    plan: Plan
    cost: int


@dataclass(frozen=True)
class Fixed:
    """The cheapest transport, hotels and meals of a route.

    Attributes:
        route: (city, days) of each stay.
        legs: Between the stays.
        hotels: Of each stay; None where it has no night.
        meals: Of each stay, in order.
        cost: Dollars of all of these.
    """

    route: Route
    legs: tuple[Leg, ...]
    hotels: tuple[Hotel | None, ...]
    meals: tuple[tuple[Restaurant, ...], ...]
    cost: int


def cheapest(query: Query) -> Solution | None:
    """The cheapest plan that keeps every rule but the budget.

    Returns:
        A plan with the exact minimum of the cost, the first one in the tables' order; None where
        there is none.
    """
    search = Search(query)
    best: Solution | None = None
    for route in routes(query):
        fixed = search.fixed(route)
        if fixed is None or (best is not None and fixed.cost >= best.cost):
            continue
        sights = search.cheapest_sights(route)
        if sights is None:
            continue
        total = fixed.cost + sights_cost(query, sights)
        if best is None or total < best.cost:
            best = Solution(make_plan(query, fixed, sights), total)
    return best


def routes(query: Query) -> Iterator[Route]:
    """Every order of stays in different cities that keeps the start and the required cities."""
    names = [city.name for city in query.country.cities]
    required = set(query.cities)
    for count in range(1, min(len(names), query.days) + 1):
        for order in itertools.permutations(names, count):
            if required <= {*order} and query.start in (None, order[0]):
                for lengths in _compositions(query.days, count):
                    yield tuple(zip(order, lengths, strict=True))


def _compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """The ordered ways to write `total` as `parts` positive numbers."""
    for cuts in itertools.combinations(range(1, total), parts - 1):
        edges = (0, *cuts, total)
        yield tuple(b - a for a, b in itertools.pairwise(edges))


class Search:
    """The parts of a search, kept for the routes that share them."""

    def __init__(self, query: Query) -> None:
        self.query = query
        self.city_of = {city.name: city for city in query.country.cities}
        self.hotel = lru_cache(None)(self._hotel)
        self.meals = lru_cache(None)(self._meals)
        self.day_sights = lru_cache(None)(self._cheapest_days)

    def fixed(self, route: Route) -> Fixed | None:
        """The cheapest legs, hotels and meals of a route; None where a rule forbids it."""
        query = self.query
        hotels: list[Hotel | None] = []
        cost = 0
        for number, (city, days) in enumerate(route, start=1):
            # The last day has no night.
            nights = days - (number == len(route))
            hotel = self.hotel(city, nights) if nights else None
            if nights and hotel is None:
                return None
            hotels.append(hotel)
            cost += nights * query.rooms * hotel.price if hotel else 0
        legs = self._legs(route)
        # Routes with the same stays in another order eat the same.
        eaten = self.meals(tuple(sorted(route)))
        if legs is None or eaten is None:
            return None
        meals = tuple(eaten[city] for city, _ in route)
        cost += query.party * (_price(legs) + total_price(meals))
        return Fixed(route, legs, tuple(hotels), meals, cost)

    def _hotel(self, city: str, nights: int) -> Hotel | None:
        query = self.query
        fitting = [
            hotel
            for hotel in self.city_of[city].hotels
            if hotel.min_nights <= nights
            and query.room in (None, hotel.room)
            and query.house_rule not in hotel.bans
        ]
        return min(fitting, key=lambda hotel: hotel.price, default=None)

    def _legs(self, route: Route) -> tuple[Leg, ...] | None:
        pairs = [{a, b} for (a, _), (b, _) in itertools.pairwise(route)]
        best: tuple[Leg, ...] | None = None
        for by_car in (False, True):
            legs: list[Leg] = []
            for pair in pairs:
                ways = [
                    leg
                    for leg in self.query.country.legs
                    if {*leg.cities} == pair
                    and (leg.mode == "car") == by_car
                    and leg.mode != self.query.avoid
                ]
                if ways:
                    legs.append(min(ways, key=lambda leg: leg.price))
            if len(legs) == len(pairs) and (best is None or _price(legs) < _price(best)):
                best = tuple(legs)
        return best

    def _meals(self, stays: Route) -> dict[str, tuple[Restaurant, ...]] | None:
        """For each city the cheapest different restaurants, each asked cuisine among them."""
        quota = {city: days * self.query.meals_per_day for city, days in stays}
        offered = {
            city: sorted(self.city_of[city].restaurants, key=lambda item: item.price)
            for city in quota
        }
        everything = [item for items in offered.values() for item in items]
        choices = [
            [item for item in everything if cuisine in item.cuisines]
            for cuisine in self.query.cuisines
        ]
        best: dict[str, tuple[Restaurant, ...]] | None = None
        for forced in itertools.product(*choices):
            eaten: dict[str, tuple[Restaurant, ...]] = {}
            for city, count in quota.items():
                must = list(dict.fromkeys(item for item in forced if item.city == city))
                rest = [item for item in offered[city] if item not in must]
                if len(must) > count or len(must) + len(rest) < count:
                    break
                eaten[city] = tuple(must + rest[: count - len(must)])
            else:
                if best is None or total_price(eaten.values()) < total_price(best.values()):
                    best = eaten
        return best

    def cheapest_sights(self, route: Route) -> SightDays | None:
        """One open sight a day, no sight twice, at the least cost; None if impossible."""
        chosen: list[tuple[Sight, ...]] = []
        for city, days in route:
            stay = self.day_sights(city, len(chosen), days)
            if stay is None:
                return None
            chosen += [(sight,) for sight in stay]
        return tuple(chosen)

    def open_sights(self, city: str, day: int) -> list[Sight]:
        """The sights of a city that are open on a day, the first one being day 0."""
        weekday = self.query.weekday(day)
        return [sight for sight in self.city_of[city].sights if weekday not in sight.closed]

    def _cheapest_days(self, city: str, first: int, days: int) -> tuple[Sight, ...] | None:
        # After each day: the set of sights used -> the cheapest way there.
        ways: dict[frozenset[Sight], tuple[Sight, ...]] = {frozenset(): ()}
        for day in range(first, first + days):
            following: dict[frozenset[Sight], tuple[Sight, ...]] = {}
            for used, way in ways.items():
                for sight in self.open_sights(city, day):
                    if sight not in used:
                        following.setdefault(used | {sight}, (*way, sight))
            ways = following
        return min(ways.values(), key=_price, default=None)


def _price(items: Iterable[Leg] | Iterable[Sight]) -> int:
    return sum(item.price for item in items)


def total_price(groups: Iterable[Iterable[Restaurant]] | Iterable[Iterable[Sight]]) -> int:
    """Dollars a person for all items of all groups."""
    return sum(item.price for group in groups for item in group)


def sights_cost(query: Query, sights: SightDays) -> int:
    """Dollars for the whole party."""
    return query.party * total_price(sights)


def make_plan(query: Query, fixed: Fixed, sights: SightDays) -> Plan:
    """The plan of a route with its bookings."""
    days: list[Day] = []
    for number, (city, length) in enumerate(fixed.route):
        meals = iter(fixed.meals[number])
        for day in range(length):
            hotel = fixed.hotels[number] if len(days) < query.days - 1 else None
            days.append(
                Day(
                    city,
                    tuple(item.name for item in itertools.islice(meals, query.meals_per_day)),
                    tuple(sight.name for sight in sights[len(days)]),
                    None if hotel is None else hotel.name,
                    fixed.legs[number - 1].mode if number and not day else None,
                )
            )
    return Plan(tuple(days))
