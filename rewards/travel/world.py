"""The world of the travel task: countries, cities, and what can be booked there.

A world is a pure function of its seed. A country's content depends on the seed, its own name and
the sizes alone, so a world of one country is a part of the world of all.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable
from dataclasses import dataclass

from cohort.actors.records import derive_seed
from cohort.rewards.travel.places import (
    BANS,
    HOTEL_KINDS,
    HOTEL_WORDS,
    MODES,
    PLACES,
    RESTAURANT_KINDS,
    RESTAURANT_WORDS,
    ROOMS,
    CountryPlaces,
)

WEEKDAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
ROOM_SLEEPS = 2


@dataclass(frozen=True)
class Hotel:
    """A hotel.

    Attributes:
        price: Dollars a room and night; a room sleeps two.
        room: Its type.
        bans: Who or what may not stay.
        min_nights: Of one stay.
    """

    name: str
    city: str
    price: int
    room: str = "private"
    bans: tuple[str, ...] = ()
    min_nights: int = 1


@dataclass(frozen=True)
class Restaurant:
    """A restaurant; its price is in dollars a person and meal."""

    name: str
    city: str
    price: int
    cuisines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sight:
    """A sight.

    Attributes:
        price: Dollars a person.
        tags: What it is, see places.TAGS.
        closed: Weekdays, 0 is Monday.
    """

    name: str
    city: str
    price: int
    tags: tuple[str, ...]
    closed: tuple[int, ...] = ()


@dataclass(frozen=True)
class Leg:
    """A way between two cities, the same in both directions; its price is in dollars a person."""

    cities: tuple[str, str]
    mode: str
    price: int


@dataclass(frozen=True)
class City:
    """What can be booked in a city."""

    name: str
    hotels: tuple[Hotel, ...]
    restaurants: tuple[Restaurant, ...]
    sights: tuple[Sight, ...]


@dataclass(frozen=True)
class Country:
    """Names of cities, hotels, restaurants and sights are unique within a country."""

    name: str
    cities: tuple[City, ...]
    legs: tuple[Leg, ...] = ()

    def city(self, name: str) -> City:
        """The city of this name.

        Raises:
            KeyError: The country has no such city.
        """
        for city in self.cities:
            if city.name == name:
                return city
        raise KeyError(name)

    def only(self, names: Iterable[str]) -> Country:
        """The country with these cities alone, in its own order, and the legs between them."""
        kept = set(names)
        cities = tuple(city for city in self.cities if city.name in kept)
        return Country(self.name, cities, tuple(leg for leg in self.legs if kept >= {*leg.cities}))


@dataclass(frozen=True)
class World:
    """All countries of a seed."""

    countries: tuple[Country, ...]

    def country(self, name: str) -> Country:
        """The country of this name.

        Raises:
            KeyError: The world has no such country.
        """
        for country in self.countries:
            if country.name == name:
                return country
        raise KeyError(name)


@dataclass(frozen=True)
class Sizes:
    """How much there is in a city.

    Attributes:
        hotels: How many.
        restaurants: How many.
        sights: How many.
        plain: Prices and tags only; no closing days, cuisines, room types, bans or minimum nights.
    """

    hotels: int = 3
    restaurants: int = 6
    sights: int = 5
    plain: bool = False


DEFAULT_SIZES = Sizes()


def make_world(
    seed: int, sizes: Sizes = DEFAULT_SIZES, countries: Iterable[str] | None = None
) -> World:
    """The world of a seed.

    Args:
        seed: Of all random choices.
        sizes: How much there is in a city.
        countries: Some of places.PLACES; by default all.

    Raises:
        ValueError: An unknown country, or more of something in a city than there are names for.
    """
    names = list(PLACES) if countries is None else list(countries)
    for name in names:
        if name not in PLACES:
            raise ValueError(f"unknown country {name!r}; there are {', '.join(PLACES)}")
    return World(tuple(_country(seed, PLACES[name], sizes) for name in names))


def _country(seed: int, places: CountryPlaces, sizes: Sizes) -> Country:
    rng = random.Random(derive_seed(seed, "names", places.name))
    count = len(places.cities)
    hotels = _names(rng, HOTEL_WORDS, HOTEL_KINDS, count * sizes.hotels)
    restaurants = _names(rng, RESTAURANT_WORDS, RESTAURANT_KINDS, count * sizes.restaurants)
    cities = []
    for position, name in enumerate(places.cities):
        h, r = position * sizes.hotels, position * sizes.restaurants
        cities.append(
            _city(
                random.Random(derive_seed(seed, places.name, name)),
                places,
                name,
                hotels[h : h + sizes.hotels],
                restaurants[r : r + sizes.restaurants],
                sizes,
            )
        )
    legs: list[Leg] = []
    for pair in itertools.combinations(places.cities, 2):
        legs += _legs(random.Random(derive_seed(seed, places.name, *pair)), places, pair)
    return Country(places.name, tuple(cities), tuple(legs))


def _names(
    rng: random.Random, words: tuple[str, ...], kinds: tuple[str, ...], count: int
) -> list[str]:
    pool = [f"{word} {kind}" for word in words for kind in kinds]
    if count > len(pool):
        raise ValueError(f"a country can have {len(pool)} of them, {count} are wanted")
    return rng.sample(pool, count)


def _city(
    rng: random.Random,
    places: CountryPlaces,
    name: str,
    hotel_names: list[str],
    restaurant_names: list[str],
    sizes: Sizes,
) -> City:
    level = places.price_level
    known = places.cities[name]
    if sizes.sights > len(known):
        raise ValueError(f"{name} has {len(known)} sights, {sizes.sights} are wanted")
    hotels = tuple(_hotel(rng, hotel, name, level, sizes.plain) for hotel in hotel_names)
    restaurants = tuple(
        Restaurant(
            restaurant,
            name,
            _price(rng, 8, 45, level),
            () if sizes.plain else _cuisines(rng, places.cuisines),
        )
        for restaurant in restaurant_names
    )
    sights = tuple(
        Sight(
            sight,
            name,
            0 if rng.random() < 0.2 else _price(rng, 4, 30, level),
            tags[:1] if sizes.plain else tags,
            () if sizes.plain else _closed(rng),
        )
        for sight, tags in rng.sample(known, sizes.sights)
    )
    return City(name, hotels, restaurants, sights)


def _price(rng: random.Random, low: int, high: int, level: float) -> int:
    return max(1, round(level * rng.uniform(low, high)))


def _hotel(rng: random.Random, name: str, city: str, level: float, plain: bool) -> Hotel:
    price = _price(rng, 40, 180, level)
    if plain:
        return Hotel(name, city, price)
    bans = tuple(ban for ban in BANS if rng.random() < 0.25)
    min_nights = rng.choices((1, 2, 3), (6, 3, 1))[0]
    return Hotel(name, city, price, rng.choice(ROOMS), bans, min_nights)


def _cuisines(rng: random.Random, cuisines: tuple[str, ...]) -> tuple[str, ...]:
    # Half of the restaurants cook as the country does.
    return (cuisines[0] if rng.random() < 0.5 else rng.choice(cuisines[1:]),)


def _closed(rng: random.Random) -> tuple[int, ...]:
    count = rng.choices((0, 1, 2), (6, 3, 1))[0]
    return tuple(sorted(rng.sample(range(7), count)))


def _legs(rng: random.Random, places: CountryPlaces, pair: tuple[str, str]) -> list[Leg]:
    """One to three ways between two cities; one of them is a train or a bus."""
    ground = rng.choice(("train", "bus"))
    modes = {ground, *rng.sample(MODES, rng.randint(0, 2))}
    price = {"train": (40, 120), "bus": (15, 60), "flight": (60, 150), "car": (30, 110)}
    return [
        Leg(pair, mode, _price(rng, *price[mode], places.price_level))
        for mode in MODES
        if mode in modes
    ]
