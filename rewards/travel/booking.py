"""A plan with its names looked up: what it costs, and how much of what it needs is real."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from cohort.rewards.travel.plan import Day, Plan
from cohort.rewards.travel.query import Query
from cohort.rewards.travel.world import Country, Hotel, Leg, Restaurant, Sight


@dataclass(frozen=True)
class BookedDay:
    """A day with its names looked up; None for a name that the world does not have.

    Attributes:
        day: As the model wrote it.
        city: Its name in the world.
        hotel: Of the night after it.
        meals: Restaurants.
        sights: Sights.
        leg: How the city is reached from the day before; None if it stays or no such way exists.
        moves: Its city is not that of the day before.
    """

    day: Day
    city: str | None
    hotel: Hotel | None
    meals: tuple[Restaurant | None, ...]
    sights: tuple[Sight | None, ...]
    leg: Leg | None
    moves: bool


Booking = tuple[BookedDay, ...]


def same_name(name: str) -> str:
    """The form in which names are compared: no case, no width variants, single spaces."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().split())


def book(query: Query, plan: Plan) -> Booking:
    """Look up every name of the plan in the query's world."""
    country = query.country
    cities = {same_name(city.name): city.name for city in country.cities}
    hotels = {same_name(item.name): item for city in country.cities for item in city.hotels}
    meals = {same_name(item.name): item for city in country.cities for item in city.restaurants}
    sights = {same_name(item.name): item for city in country.cities for item in city.sights}
    booked: list[BookedDay] = []
    for day in plan.days:
        city = cities.get(same_name(day.city))
        moves = bool(booked) and same_name(day.city) != same_name(booked[-1].day.city)
        previous = booked[-1].city if booked else None
        booked.append(
            BookedDay(
                day,
                city,
                None if day.hotel is None else hotels.get(same_name(day.hotel)),
                tuple(meals.get(same_name(name)) for name in day.meals),
                tuple(sights.get(same_name(name)) for name in day.sights),
                find_leg(country, previous, city, day.travel) if moves else None,
                moves,
            )
        )
    return tuple(booked)


def find_leg(
    country: Country, origin: str | None, destination: str | None, mode: str | None
) -> Leg | None:
    """The listed way from one city to another, in either direction.

    Args:
        country: With all ways.
        origin: A city.
        destination: A city.
        mode: Of transport, as the model wrote it.

    Returns:
        The way; None where there is none.
    """
    for leg in country.legs:
        ends = {*leg.cities} == {origin, destination}
        if ends and mode is not None and same_name(mode) == leg.mode:
            return leg
    return None


def cost(query: Query, booking: Booking) -> int:
    """Dollars for all that was found in the world, for the whole party."""
    total = 0
    for day in booking:
        total += query.rooms * day.hotel.price if day.hotel else 0
        total += query.party * sum(meal.price for meal in day.meals if meal)
        total += query.party * sum(sight.price for sight in day.sights if sight)
        total += query.party * day.leg.price if day.leg else 0
    return total


def coverage(query: Query, booking: Booking) -> float:
    """The fraction of the bookings that the trip needs which are real.

    Needed: on each asked day the meals and one sight, a hotel for each night, a way for each change
    of city. Real: in the world, in that day's city, not booked before. Bookings beyond what a day
    holds or beyond the asked days raise the denominator, so naming everything does not pay.

    Returns:
        A number in [0, 1].
    """
    needed = query.days * (query.meals_per_day + 1) + query.days - 1
    real = extra = 0
    seen: set[Restaurant | Sight] = set()
    for number, booked in enumerate(booking):
        given = len(booked.meals) + len(booked.sights)
        if number >= query.days:
            extra += given + 1
            continue
        meals = _fresh(booked, booked.meals, seen)
        sights = _fresh(booked, booked.sights, seen)
        real += min(len(meals), query.meals_per_day) + min(len(sights), 1)
        extra += max(0, len(booked.meals) - query.meals_per_day)
        extra += max(0, len(booked.sights) - query.max_sights)
        if number < query.days - 1:
            real += booked.hotel is not None and booked.hotel.city == booked.city
        else:
            extra += booked.day.hotel is not None
        if booked.moves:
            needed += 1
            real += booked.leg is not None
        else:
            extra += booked.day.travel is not None
    return real / (needed + extra)


def _fresh(
    booked: BookedDay,
    items: Sequence[Restaurant | None] | Sequence[Sight | None],
    seen: set[Restaurant | Sight],
) -> list[Restaurant | Sight]:
    fresh: list[Restaurant | Sight] = []
    for item in items:
        if item is not None and item.city == booked.city and item not in seen:
            seen.add(item)
            fresh.append(item)
    return fresh
