"""A query in words: the customer's sentence, the reference tables, the format of the answer."""

from __future__ import annotations

from cohort.rewards.travel.query import Query
from cohort.rewards.travel.world import WEEKDAYS, City, Hotel, Restaurant, Sight

WORDINGS = 4

INTERESTS = {
    "culture": "cultural experiences",
    "temple": "temples",
    "church": "churches",
    "museum": "museums",
    "castle": "castles",
    "ruins": "ruins",
    "theatre": "theatre",
    "garden": "gardens",
    "nature": "nature",
    "market": "markets",
    "cuisine": "local cuisine",
    "view": "views",
}


def messages(query: Query) -> list[dict[str, str]]:
    """The prompt as chat messages: one of the user."""
    return [{"role": "user", "content": prompt_text(query)}]


def prompt_text(query: Query) -> str:
    """The sentence, the tables and the instructions."""
    return "\n".join([sentence(query), tables(query), instructions(query)])


# The sentence -------------------------------------------------------------------------------------


def sentence(query: Query, likes: str | None = None) -> str:
    """The customer's sentence, in the paraphrase that `wording` chooses.

    Args:
        query: The customer's.
        likes: Said in place of the interests.
    """
    place = query.country.name
    if not query.several_cities:
        place = f"{query.country.cities[0].name}, {place}"
    cities = query.cities if query.several_cities else ()
    interests = likes or taste(query)
    people = "" if query.party == 1 else f"{query.party} people"
    money = f"${query.budget:,}"
    match query.wording:
        case 0:
            text = (
                f"Plan a {query.days}-day trip to {place}"
                f"{f' for {people}' if people else ''}"
                f"{f', including {_join(cities)},' if cities else ','}"
                f" focusing on {interests} and staying under {money}."
            )
        case 1:
            text = (
                f"{f'There are {query.party} of us, and we' if people else 'I'} want to spend "
                f"{_count(query.days, 'day')} in {place}"
                f"{f' and must see {_join(cities)}' if cities else ''}. "
                f"{'We' if people else 'I'} like {interests}. The budget is {money} in total."
            )
        case 2:
            text = (
                f"{place}, {_count(query.days, 'day')}, {people or '1 person'}, "
                f"{money} at most.{f' Cities: {_join(cities)}.' if cities else ''} "
                f"Interests: {interests}."
            )
        case _:
            text = (
                f"With {money}, what would you book for {_count(query.days, 'day')} in {place}"
                f"{f' for {people}' if people else ''}, if {interests} matter most?"
                f"{f' {_join(cities)} must be part of it.' if cities else ''}"
            )
    return " ".join([text, *_constraints(query)])


def taste(query: Query) -> str:
    """What the customer likes."""
    return _join([INTERESTS[interest] for interest in query.interests])


def _constraints(query: Query) -> list[str]:
    wishes = []
    if query.start is not None:
        wishes.append(f"The first day is in {query.start}.")
    if query.room is not None:
        rooms = {"entire": "an entire place", "private": "private rooms", "shared": "shared rooms"}
        wishes.append(f"Only {rooms[query.room]}, please.")
    if query.house_rule is not None:
        wishes.append(f"Every hotel must allow {query.house_rule}.")
    if query.cuisines:
        wishes.append(f"One meal at least must be {_join(query.cuisines, ' and one ')}.")
    if query.avoid is not None:
        wishes.append(f"No {query.avoid}, please.")
    return wishes


def _join(items: list[str] | tuple[str, ...], last: str = " and ") -> str:
    return last.join([", ".join(items[:-1]), items[-1]]) if len(items) > 1 else items[0]


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


# The tables ---------------------------------------------------------------------------------------


def tables(query: Query) -> str:
    """All that may be booked, with only the columns that matter to this query."""
    lines = []
    for city in query.country.cities:
        lines += [f"[{city.name}]"] if query.several_cities else []
        lines += [
            f"{what.capitalize()}: {found}" for what, found in city_lines(query, city).items()
        ]
    return "\n".join([*lines, *transport_lines(query)])


def city_lines(query: Query, city: City) -> dict[str, str]:
    """Names and prices in a city, by "hotels" (where a night is spent), "food" and "sights"."""
    lines = {
        "food": "; ".join(_restaurant(query, item) for item in city.restaurants),
        "sights": "; ".join(_sight(item) for item in city.sights),
    }
    if query.days == 1:
        return lines
    return {"hotels": "; ".join(_hotel(query, item) for item in city.hotels), **lines}


def transport_lines(query: Query) -> list[str]:
    """A title, and the ways between every two cities; empty where there is one city only."""
    if not query.country.legs:
        return []
    by_pair: dict[tuple[str, str], list[str]] = {}
    for leg in query.country.legs:
        by_pair.setdefault(leg.cities, []).append(f"{leg.mode} ${leg.price}")
    ways = [f"{a}-{b}: {', '.join(ways)}" for (a, b), ways in by_pair.items()]
    return ["Transport, per person, both ways:", *ways]


def _hotel(query: Query, hotel: Hotel) -> str:
    words = [f"{hotel.name} ${hotel.price}"]
    if query.room is not None:
        words.append(hotel.room)
    if query.house_rule is not None:
        words += [f"no {ban}" for ban in hotel.bans]
    if hotel.min_nights > 1:
        words.append(f"{hotel.min_nights}+ nights")
    return ", ".join(words)


def _restaurant(query: Query, restaurant: Restaurant) -> str:
    cuisines = restaurant.cuisines if query.cuisines else ()
    return " ".join([f"{restaurant.name} ${restaurant.price}", *cuisines])


def _sight(sight: Sight) -> str:
    words = f"{sight.name} ${sight.price} {'/'.join(sight.tags)}"
    if not sight.closed:
        return words
    return f"{words}, closed {'/'.join(WEEKDAYS[day] for day in sight.closed)}"


# The answer ---------------------------------------------------------------------------------------


def instructions(query: Query) -> str:
    """The rules of the trip in short, and the format."""
    rules = [
        f"Each day: {_count(query.meals_per_day, 'meal')}, 1-{query.max_sights} sights, "
        "nothing twice."
    ]
    if query.days > 1:
        per = f"a room (for 2) and night, {query.rooms} needed" if query.party > 1 else "a night"
        rules.append(f"A hotel ({per}) each night, none on the last day.")
    if query.party > 1:
        rules.append("Other prices are per person.")
    if query.has_closing_days:
        rules.append(f"Day 1 is a {WEEKDAYS[query.first_weekday]}.")
    if query.several_cities:
        rules.append('"travel" on the day you change city; never return; a car for all or none.')
    day = ['"city":""']
    if query.several_cities:
        day.append('"travel":""')
    if query.days > 1:
        day.append('"hotel":""')
    day += ['"meals":[""]', '"sights":[""]']
    return " ".join(rules) + '\nJSON only: {"days":[{' + ",".join(day) + "}]}"
