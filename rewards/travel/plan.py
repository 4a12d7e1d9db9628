"""The itinerary format: one JSON object, parsed strictly.

    {"days": [{"city": "Kyoto", "travel": "train", "hotel": "Park Inn",
               "meals": ["Blue Bowl"], "sights": ["Kinkakuji"]}, ...]}

`city`, `meals` and `sights` are required in every day. `travel` (the mode of transport on the day
of a change of city) and `hotel` (none on the last day) may be left out, null or "". There is no
place for prices: what a plan costs is computed, never believed.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import NoReturn

from cohort.rewards.extract import final_part

# A plan of two weeks has about 4,000 characters; the bounds keep hostile texts cheap.
MAX_CHARACTERS = 20_000
MAX_DAYS = 60
MAX_ITEMS = 50
MAX_NAME = 200

REQUIRED = ("city", "meals", "sights")
OPTIONAL = ("travel", "hotel")


class PlanError(ValueError):
    """The text has no itinerary in the format; the message names the first mistake."""


@dataclass(frozen=True)
class Day:
    """One day as the model wrote it: names that may or may not exist."""

    city: str
    meals: tuple[str, ...]
    sights: tuple[str, ...]
    hotel: str | None = None
    travel: str | None = None


@dataclass(frozen=True)
class Plan:
    """An itinerary."""

    days: tuple[Day, ...]


def parse_plan(text: str) -> Plan:
    """The itinerary in a completion: the first JSON object of its final part, also in a code fence.

    Text before and after the object is allowed. See `cohort.rewards.extract.final_part`.

    Args:
        text: The completion.

    Raises:
        PlanError: Anything is not in the format: another or a doubled key, a value of another type,
            NaN, an empty name, no days, too long.
    """
    final = final_part(text) or ""
    start = final.find("{")
    if start < 0:
        raise PlanError("no JSON object")
    body = final[start : start + MAX_CHARACTERS]
    decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)
    try:
        value, _ = decoder.raw_decode(body)
    except PlanError:
        raise
    except RecursionError as error:
        raise PlanError("the JSON is nested too deeply") from error
    except ValueError as error:  # bad JSON; also an integer of more than 4300 digits
        cut = f" in its first {MAX_CHARACTERS} characters" if len(final) - start > len(body) else ""
        raise PlanError(f"no valid JSON{cut}: {error}") from error
    days = _keys(value, ("days",), (), "the plan")["days"]
    if not isinstance(days, list) or not days:
        raise PlanError("'days' must be a list with at least one day")
    if len(days) > MAX_DAYS:
        raise PlanError(f"'days' has {len(days)} entries, more than {MAX_DAYS}")
    return Plan(tuple(_day(day, number) for number, day in enumerate(days, start=1)))


def to_json(plan: Plan) -> str:
    """The plan in its shortest form, as demonstrations write it."""
    days = []
    for day in plan.days:
        values: dict[str, object] = {"city": day.city}
        if day.travel is not None:
            values["travel"] = day.travel
        if day.hotel is not None:
            values["hotel"] = day.hotel
        days.append(values | {"meals": list(day.meals), "sights": list(day.sights)})
    return json.dumps({"days": days}, ensure_ascii=False, separators=(",", ":"))


def _day(value: object, number: int) -> Day:
    where = f"day {number}"
    values = _keys(value, REQUIRED, OPTIONAL, where)
    return Day(
        _name(values["city"], f"{where}: 'city'"),
        _names(values["meals"], f"{where}: 'meals'"),
        _names(values["sights"], f"{where}: 'sights'"),
        _optional(values.get("hotel"), f"{where}: 'hotel'"),
        _optional(values.get("travel"), f"{where}: 'travel'"),
    )


def _keys(
    value: object, required: tuple[str, ...], optional: tuple[str, ...], where: str
) -> dict[str, object]:
    if not isinstance(value, dict):
        raise PlanError(f"{where} must be an object, not a {type(value).__name__}")
    for name in required:
        if name not in value:
            raise PlanError(f"{where} has no '{name}'")
    for name in value:
        if name not in required and name not in optional:
            raise PlanError(f"{where} has an unknown key {ascii(name)[:80]}")
    return value


def _optional(value: object, where: str) -> str | None:
    # Models fill in "" for what a day does not need.
    return None if value is None or value == "" else _name(value, where)


def _name(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise PlanError(f"{where} must be a name, not a {type(value).__name__}")
    if not value.strip():
        raise PlanError(f"{where} is empty")
    if len(value) > MAX_NAME:
        raise PlanError(f"{where} has more than {MAX_NAME} characters")
    return value


def _names(value: object, where: str) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise PlanError(f"{where} must be a list of names, not a {type(value).__name__}")
    if len(value) > MAX_ITEMS:
        raise PlanError(f"{where} has {len(value)} entries, more than {MAX_ITEMS}")
    return tuple(_name(item, where) for item in value)


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise PlanError("a key is given twice in one object")
    return values


def _no_constant(name: str) -> NoReturn:
    raise PlanError(f"{name} is not JSON")
