"""The rules of an itinerary, each with a name and a message, as pure checks.

Commonsense rules follow TravelPlanner (arXiv:2402.01622): inside the sandbox, complete
information, current city, city route, diverse restaurants, diverse attractions, transport without
conflict, minimum nights; opening days are added. Hard rules follow it too: budget, room type,
room rule, cuisine, transport; days and required cities are added.

Which rules apply depends on the query alone, never on the plan. A rule about things that a plan
does not have fails: an empty plan obeys nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from cohort.rewards.travel.booking import Booking, cost, same_name
from cohort.rewards.travel.query import Query
from cohort.rewards.travel.world import WEEKDAYS, Hotel

Check = Callable[[Query, Booking], str | None]


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        name: In the parts of the reward.
        applies: Whether it applies to a query.
        check: The problem in words, or None where the rule holds.
    """

    name: str
    applies: Callable[[Query], bool]
    check: Check


@dataclass(frozen=True)
class Finding:
    """The result of one rule.

    Attributes:
        rule: Its name.
        passed: It holds.
        problem: In words; empty where it holds.
    """

    rule: str
    passed: bool
    problem: str = ""


def apply_rules(rules: tuple[Rule, ...], query: Query, booking: Booking) -> tuple[Finding, ...]:
    """The findings of the rules that apply to the query."""
    findings = []
    for rule in rules:
        if rule.applies(query):
            problem = rule.check(query, booking)
            findings.append(Finding(rule.name, problem is None, problem or ""))
    return tuple(findings)


# Commonsense --------------------------------------------------------------------------------------


def _shown(name: str) -> str:
    return ascii(name)[:60]


def _within_world(query: Query, booking: Booking) -> str | None:
    modes = {leg.mode for leg in query.country.legs}
    for number, booked in enumerate(booking, start=1):
        day = booked.day
        if booked.city is None:
            return f"day {number}: there is no city {_shown(day.city)}"
        if day.hotel is not None and booked.hotel is None:
            return f"day {number}: there is no hotel {_shown(day.hotel)}"
        if day.travel is not None and same_name(day.travel) not in modes:
            return f"day {number}: there is no transport by {_shown(day.travel)}"
        for name, meal in zip(day.meals, booked.meals, strict=True):
            if meal is None:
                return f"day {number}: there is no restaurant {_shown(name)}"
        for name, sight in zip(day.sights, booked.sights, strict=True):
            if sight is None:
                return f"day {number}: there is no sight {_shown(name)}"
    if not any(booked.hotel or booked.meals or booked.sights for booked in booking):
        return "nothing is booked"
    return None


def _complete(query: Query, booking: Booking) -> str | None:
    if len(booking) < query.days:
        return f"{len(booking)} of {query.days} days"
    for number, booked in enumerate(booking, start=1):
        meals, sights = len(booked.day.meals), len(booked.day.sights)
        if meals != query.meals_per_day:
            return f"day {number}: {meals} meals, not {query.meals_per_day}"
        if not 1 <= sights <= query.max_sights:
            return f"day {number}: {sights} sights, not 1 to {query.max_sights}"
        if number < len(booking) and booked.day.hotel is None:
            return f"day {number}: no hotel for the night"
    return None


def _within_city(_: Query, booking: Booking) -> str | None:
    found = 0
    for number, booked in enumerate(booking, start=1):
        for item in (booked.hotel, *booked.meals, *booked.sights):
            if item is not None:
                found += 1
                if item.city != booked.city:
                    return f"day {number}: {item.name} is in {item.city}"
    return None if found else "nothing is booked"


def _route(query: Query, booking: Booking) -> str | None:
    cities = [same_name(booked.day.city) for booked in booking]
    if any(booked.city is None for booked in booking):
        return "a city that does not exist"
    stays = [city for city, _ in itertools.groupby(cities)]
    if len(stays) != len(set(stays)):
        return "a city is left and visited again"
    if query.start is not None and booking[0].city != query.start:
        return f"day 1 is not in {query.start}"
    return None if _visited(booking) else "nothing is visited"


def _transport(query: Query, booking: Booking) -> str | None:
    for number, booked in enumerate(booking, start=1):
        if booked.moves and booked.leg is None:
            return f"day {number}: no listed transport to {_shown(booked.day.city)}"
        if not booked.moves and booked.day.travel is not None:
            return f"day {number}: transport without a change of city"
    modes = {booked.leg.mode for booked in booking if booked.leg}
    if "car" in modes and len(modes) > 1:
        return "a hired car is left behind"
    if len(query.cities) > 1 and not modes:
        return "no transport"
    # A stay in one city needs none, but an empty plan is not a stay.
    return None if _visited(booking) else "nothing is visited"


def _visited(booking: Booking) -> bool:
    return any(item for booked in booking for item in (*booked.meals, *booked.sights))


def _visits(booking: Booking, kind: str) -> Iterator[tuple[int, str]]:
    for number, booked in enumerate(booking, start=1):
        names = booked.day.meals if kind == "restaurant" else booked.day.sights
        for name in names:
            yield number, same_name(name)


def _diverse(booking: Booking, kind: str) -> str | None:
    first: dict[str, int] = {}
    for number, name in _visits(booking, kind):
        if name in first:
            return f"day {number}: {_shown(name)} was visited on day {first[name]}"
        first[name] = number
    known = [item for b in booking for item in (b.meals if kind == "restaurant" else b.sights)]
    return None if any(known) else f"no {kind}s"


def _diverse_restaurants(_: Query, booking: Booking) -> str | None:
    return _diverse(booking, "restaurant")


def _diverse_sights(_: Query, booking: Booking) -> str | None:
    return _diverse(booking, "sight")


def _open(query: Query, booking: Booking) -> str | None:
    found = 0
    for number, booked in enumerate(booking):
        for sight in booked.sights:
            if sight is not None:
                found += 1
                weekday = query.weekday(number)
                if weekday in sight.closed:
                    return f"day {number + 1}: {sight.name} is closed on {WEEKDAYS[weekday]}"
    return None if found else "no sights"


def _nights(_: Query, booking: Booking) -> str | None:
    if booking[-1].day.hotel is not None:
        return "the last day has no night"
    nights = [booked.hotel for booked in booking if booked.hotel is not None]
    if not nights:
        return "no nights"
    for hotel, stay in itertools.groupby(booked.hotel for booked in booking[:-1]):
        count = len(list(stay))
        if hotel is not None and count < hotel.min_nights:
            return f"{hotel.name}: {count} nights, at least {hotel.min_nights}"
    return None


# Hard ---------------------------------------------------------------------------------------------


def _days(query: Query, booking: Booking) -> str | None:
    return None if len(booking) == query.days else f"{len(booking)} days, not {query.days}"


def _budget(query: Query, booking: Booking) -> str | None:
    total = cost(query, booking)
    return None if total <= query.budget else f"${total} of ${query.budget}"


def _cities(query: Query, booking: Booking) -> str | None:
    missing = set(query.cities) - {booked.city for booked in booking}
    return f"not in {', '.join(sorted(missing))}" if missing else None


def _hotels(booking: Booking) -> list[Hotel]:
    return [booked.hotel for booked in booking if booked.hotel is not None]


def _room(query: Query, booking: Booking) -> str | None:
    wrong = [hotel.name for hotel in _hotels(booking) if hotel.room != query.room]
    return f"{wrong[0]} has no {query.room} rooms" if wrong else None


def _house_rule(query: Query, booking: Booking) -> str | None:
    wrong = [hotel.name for hotel in _hotels(booking) if query.house_rule in hotel.bans]
    return f"{wrong[0]} allows no {query.house_rule}" if wrong else None


def _cuisine(query: Query, booking: Booking) -> str | None:
    eaten = {cuisine for day in booking for meal in day.meals if meal for cuisine in meal.cuisines}
    missing = [cuisine for cuisine in query.cuisines if cuisine not in eaten]
    return f"no {missing[0]} food" if missing else None


def _avoid(query: Query, booking: Booking) -> str | None:
    used = any(booked.leg and booked.leg.mode == query.avoid for booked in booking)
    return f"a {query.avoid} is used" if used else None


def _always(_: Query) -> bool:
    return True


COMMONSENSE = (
    Rule("within_world", _always, _within_world),
    Rule("complete", _always, _complete),
    Rule("within_city", lambda query: query.several_cities, _within_city),
    Rule("route", lambda query: query.several_cities, _route),
    Rule("transport", lambda query: query.several_cities, _transport),
    Rule(
        "diverse_restaurants",
        lambda query: query.days * query.meals_per_day > 1,
        _diverse_restaurants,
    ),
    Rule("diverse_sights", lambda query: query.days * query.max_sights > 1, _diverse_sights),
    Rule("open", lambda query: query.has_closing_days, _open),
    Rule("nights", lambda query: query.days > 1, _nights),
)

HARD = (
    Rule("days", _always, _days),
    Rule("budget", _always, _budget),
    Rule("cities", lambda query: query.several_cities and bool(query.cities), _cities),
    Rule("room_type", lambda query: query.room is not None and query.days > 1, _room),
    Rule("house_rule", lambda query: query.house_rule is not None and query.days > 1, _house_rule),
    Rule("cuisine", lambda query: bool(query.cuisines), _cuisine),
    Rule("avoid", lambda query: query.avoid is not None and query.several_cities, _avoid),
)
