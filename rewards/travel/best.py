"""Exact search for the best soft scores that a query's budget can buy."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

from cohort.rewards.travel.plan import Plan
from cohort.rewards.travel.query import Query, matches
from cohort.rewards.travel.scores import Soft, culture_kinds, interest_target, soft_from_counts
from cohort.rewards.travel.solver import (
    Fixed,
    Route,
    Search,
    SightDays,
    make_plan,
    routes,
    sights_cost,
    total_price,
)
from cohort.rewards.travel.world import Sight


@dataclass(frozen=True)
class BestSoft:
    """A plan within the budget whose soft mean no plan within the budget exceeds.

    Attributes:
        plan: The plan.
        cost: Dollars.
        soft: Its soft scores.
    """

    plan: Plan
    cost: int
    soft: Soft


@dataclass(frozen=True)
class Gain:
    """What the sights so far add to the soft scores; counts stop where more would not matter.

    Attributes:
        culture: Sights of culture.
        kinds: Of culture, among these.
        interests: Sights of each interest.
        fewest: Sights of the emptiest day.
        most: Sights of the fullest day.
    """

    culture: int
    kinds: frozenset[str]
    interests: tuple[int, ...]
    fewest: int
    most: int

    @classmethod
    def none(cls, query: Query) -> Gain:
        """What no day at all adds."""
        return cls(0, frozenset(), (0,) * len(query.interests), query.max_sights, 0)

    def plus_day(self, query: Query, sights: tuple[Sight, ...]) -> Gain:
        """With the sights of another day."""
        kinds = [culture_kinds(sight) for sight in sights]
        counts = tuple(
            sum(matches(sight, interest) for sight in sights) for interest in query.interests
        )
        day = Gain(
            sum(map(bool, kinds)), frozenset().union(*kinds), counts, len(sights), len(sights)
        )
        return self.plus(query, day)

    def plus(self, query: Query, other: Gain) -> Gain:
        """With what other days add."""
        target = interest_target(query)
        return Gain(
            min(query.days, self.culture + other.culture),
            self.kinds | other.kinds,
            tuple(min(target, a + b) for a, b in zip(self.interests, other.interests, strict=True)),
            min(self.fewest, other.fewest),
            max(self.most, other.most),
        )

    def soft(self, query: Query) -> Soft:
        """The soft scores of a plan whose sights add this."""
        spread = max(0, self.most - self.fewest)
        return soft_from_counts(query, self.culture, len(self.kinds), self.interests, spread)


class SoftSearch(Search):
    """The search, with all that the sights of a stay can add."""

    def __init__(self, query: Query) -> None:
        super().__init__(query)
        self.stay = lru_cache(None)(self._stay)

    def _stay(self, city: str, first: int, days: int) -> dict[Gain, SightDays]:
        """What the stay can add -> the cheapest sights that do."""
        # The sights used belong to the state only within the stay.
        states: dict[tuple[Gain, frozenset[Sight]], SightDays] = {
            (Gain.none(self.query), frozenset()): ()
        }
        for day in range(first, first + days):
            following: dict[tuple[Gain, frozenset[Sight]], SightDays] = {}
            for (gain, used), way in states.items():
                free = [sight for sight in self.open_sights(city, day) if sight not in used]
                for count in range(1, self.query.max_sights + 1):
                    for chosen in itertools.combinations(free, count):
                        key = (gain.plus_day(self.query, chosen), used.union(chosen))
                        following.setdefault(key, (*way, chosen))
            states = following
        best: dict[Gain, SightDays] = {}
        for (gain, _), way in states.items():
            if gain not in best or total_price(way) < total_price(best[gain]):
                best[gain] = way
        return best


def best_soft(query: Query) -> BestSoft | None:
    """The best soft mean that any plan within the budget reaches, exactly.

    Routes are searched in the order of what their stays could add if money did not matter, and the
    search ends when no route left could beat the best plan found: the result is optimal.

    Returns:
        A plan with this mean; None where no plan is within the budget.
    """
    search = SoftSearch(query)
    candidates: list[tuple[float, Fixed]] = []
    for route in routes(query):
        fixed = search.fixed(route)
        if fixed is not None and fixed.cost <= query.budget:
            bound = _bound(query, _blocks(search, route))
            if bound is not None:
                candidates.append((bound, fixed))
    candidates.sort(key=lambda item: -item[0])
    best: BestSoft | None = None
    for bound, fixed in candidates:
        if best is not None and bound <= best.soft.mean + 1e-12:
            break
        left = query.budget - fixed.cost
        ways: dict[Gain, SightDays] = {Gain.none(query): ()}
        for block in _blocks(search, fixed.route):
            ways = _extend(query, ways, block, left)
        for gain, way in ways.items():
            soft = gain.soft(query)
            if best is None or soft.mean > best.soft.mean:
                cost = fixed.cost + sights_cost(query, way)
                best = BestSoft(make_plan(query, fixed, way), cost, soft)
    return best


def _blocks(search: SoftSearch, route: Route) -> list[dict[Gain, SightDays]]:
    blocks = []
    first = 0
    for city, days in route:
        blocks.append(search.stay(city, first, days))
        first += days
    return blocks


def _bound(query: Query, blocks: list[dict[Gain, SightDays]]) -> float | None:
    """More than any plan of these stays can reach; None where a stay has no plan."""
    total = Gain.none(query)
    for block in blocks:
        if not block:
            return None
        most = Gain(
            max(gain.culture for gain in block),
            frozenset().union(*(gain.kinds for gain in block)),
            tuple(map(max, zip(*(gain.interests for gain in block), strict=True))),
            1,
            1,
        )
        total = total.plus(query, most)
    return total.soft(query).mean


def _extend(
    query: Query, ways: dict[Gain, SightDays], block: dict[Gain, SightDays], left: int
) -> dict[Gain, SightDays]:
    best: dict[Gain, tuple[int, SightDays]] = {}
    priced = [(gain, way, sights_cost(query, way)) for gain, way in block.items()]
    for gain, way in ways.items():
        spent = sights_cost(query, way)
        for other, more, price in priced:
            cost = spent + price
            if cost <= left:
                key = gain.plus(query, other)
                if key not in best or cost < best[key][0]:
                    best[key] = (cost, way + more)
    return {gain: way for gain, (_, way) in best.items()}
