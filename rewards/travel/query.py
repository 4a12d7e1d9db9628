"""A customer's query: what is asked for, and the closed world it may be booked from.

The structured fields are what is scored; prompt.py turns them into words.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from pydantic import ConfigDict, TypeAdapter, ValidationError

from cohort.rewards.travel.places import CULTURE
from cohort.rewards.travel.world import ROOM_SLEEPS, Country, Sight


class QueryError(ValueError):
    """A query that cannot be read or made; the message names the field to change."""


@dataclass(frozen=True)
class Query:
    """What a customer wants.

    Attributes:
        country: The tables of the prompt, and all that may be booked.
        days: Of the trip.
        party: Persons.
        budget: Dollars for all of them.
        interests: Tags of sights; "culture" stands for all of places.CULTURE.
        meals_per_day: Meals of each day.
        max_sights: Of one day; at least one is needed.
        first_weekday: Of day 1, 0 is Monday.
        cities: Those that must be visited; only asked where the country has more than one.
        start: The city of the first day.
        room: The type of every room.
        house_rule: What every hotel must allow.
        cuisines: Each to be eaten at least once.
        avoid: A mode of transport.
        level: Of difficulty; 0: none.
        wording: Which paraphrase is used; it changes no rule.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    country: Country
    days: int
    party: int
    budget: int
    interests: tuple[str, ...]
    meals_per_day: int = 1
    max_sights: int = 2
    first_weekday: int = 0
    cities: tuple[str, ...] = ()
    start: str | None = None
    room: str | None = None
    house_rule: str | None = None
    cuisines: tuple[str, ...] = ()
    avoid: str | None = None
    level: int = 0
    wording: int = 0

    def weekday(self, day: int) -> int:
        """The weekday of a day, the first one being day 0."""
        return (self.first_weekday + day) % 7

    @property
    def has_closing_days(self) -> bool:
        """Whether some sight is closed on some day."""
        return any(sight.closed for city in self.country.cities for sight in city.sights)

    @property
    def several_cities(self) -> bool:
        """Whether the tables have more than one city."""
        return len(self.country.cities) > 1

    @property
    def rooms(self) -> int:
        """Hotel rooms that the party needs."""
        return -(-self.party // ROOM_SLEEPS)


def matches(sight: Sight, interest: str) -> bool:
    """Whether a sight is what an interest asks for."""
    if interest == "culture":
        return any(tag in CULTURE for tag in sight.tags)
    return interest in sight.tags


def to_columns(query: Query) -> dict[str, object]:
    """The query as plain JSON values, for a dataset column."""
    # Through JSON: tuples become lists, as they will be after a file was written and read.
    columns: dict[str, object] = json.loads(json.dumps(dataclasses.asdict(query)))
    return columns


def from_columns(columns: object) -> Query:
    """The query of a dataset column.

    Raises:
        QueryError: The column has no query.
    """
    try:
        return _ADAPTER.validate_python(columns)
    except ValidationError as error:
        raise QueryError(f"the column 'query' does not hold a travel query: {error}") from error


_ADAPTER = TypeAdapter(Query)
