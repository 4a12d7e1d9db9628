"""What a plan is worth: rules, soft scores, one total, and the metrics over many plans.

The total follows Planner-R1 (arXiv:2509.25779): a valid schema, the fraction of commonsense
rules that hold, the fraction of hard rules that hold, a bonus when all hold. Two gates are our own:
the fractions are multiplied by `coverage` or need all of it, so that leaving bookings out never
pays; and soft scores count only for a plan that breaks no rule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from cohort.rewards.travel.booking import book, cost, coverage
from cohort.rewards.travel.places import CULTURE
from cohort.rewards.travel.plan import PlanError, parse_plan
from cohort.rewards.travel.query import Query, matches
from cohort.rewards.travel.rules import COMMONSENSE, HARD, Finding, Rule, apply_rules
from cohort.rewards.travel.world import Sight

# Exact in binary: a plan that breaks no rule has 1.0 before its soft scores.
SCHEMA_WEIGHT = 0.125
COMMONSENSE_WEIGHT = 0.25
HARD_WEIGHT = 0.25
PASS_WEIGHT = 0.375
SOFT_WEIGHT = 0.5
MAX_TOTAL = 1.5


@dataclass(frozen=True)
class Soft:
    """Soft scores, each in [0, 1].

    Attributes:
        culture: Sights of culture, and how many kinds of it.
        interests: Sights of each interest.
        balance: Whether all days have as many sights.
    """

    culture: float = 0.0
    interests: float = 0.0
    balance: float = 0.0

    @property
    def mean(self) -> float:
        """Their weighted mean; balance, the easiest, counts half."""
        return 0.4 * self.culture + 0.4 * self.interests + 0.2 * self.balance


@dataclass(frozen=True)
class Evaluation:
    """All results for one completion.

    Attributes:
        schema_problem: Why there is no plan; None where there is one.
        commonsense: A finding for each rule that applies to the query; without a plan none holds.
        hard: The same. As in TravelPlanner they are checked only where `within_world` and
            `complete` hold; elsewhere none holds.
        coverage: In [0, 1], see `booking.coverage`.
        cost: Dollars of all that exists in the plan; None without one.
        soft: 0 unless all rules hold.
    """

    schema_problem: str | None
    commonsense: tuple[Finding, ...]
    hard: tuple[Finding, ...]
    coverage: float
    cost: int | None
    soft: Soft

    @property
    def delivered(self) -> bool:
        """Whether there is a plan."""
        return self.schema_problem is None

    @property
    def commonsense_passed(self) -> bool:
        """Whether every commonsense rule holds."""
        return all(finding.passed for finding in self.commonsense)

    @property
    def hard_passed(self) -> bool:
        """Whether every hard rule holds."""
        return all(finding.passed for finding in self.hard)

    @property
    def passed(self) -> bool:
        """Whether every rule holds: the final pass of TravelPlanner."""
        return self.delivered and self.commonsense_passed and self.hard_passed

    @property
    def commonsense_fraction(self) -> float:
        """The fraction of the commonsense rules that hold, times the coverage."""
        return self.coverage * _fraction(self.commonsense)

    @property
    def hard_fraction(self) -> float:
        """The fraction of the hard rules that hold; 0 until all that is needed is really booked.

        A trip without hotels, or with every meal in the cheapest place, is within any budget.
        """
        return _fraction(self.hard) if self.coverage == 1 else 0.0

    @property
    def total(self) -> float:
        """The reward, in [0, 1.5]; at least 1 exactly where every rule holds."""
        return (
            SCHEMA_WEIGHT * self.delivered
            + COMMONSENSE_WEIGHT * self.commonsense_fraction
            + HARD_WEIGHT * self.hard_fraction
            + PASS_WEIGHT * self.passed
            + SOFT_WEIGHT * self.soft.mean
        )

    @property
    def parts(self) -> dict[str, float]:
        """Every part by name, as numbers to log; `rule_` and its name for each rule."""
        rules = {f"rule_{f.rule}": float(f.passed) for f in (*self.commonsense, *self.hard)}
        return {
            "schema": float(self.delivered),
            "coverage": self.coverage,
            "commonsense": self.commonsense_fraction,
            "hard": self.hard_fraction,
            "passed": float(self.passed),
            "culture": self.soft.culture,
            "interests": self.soft.interests,
            "balance": self.soft.balance,
        } | rules


def evaluate(query: Query, text: str) -> Evaluation:
    """Evaluate one completion; a pure function.

    Args:
        query: The customer's.
        text: Any text.
    """
    try:
        plan = parse_plan(text)
    except PlanError as error:
        reason = "no plan"
        return Evaluation(
            str(error),
            _all_failed(COMMONSENSE, query, reason),
            _all_failed(HARD, query, reason),
            0.0,
            None,
            Soft(),
        )
    booking = book(query, plan)
    commonsense = apply_rules(COMMONSENSE, query, booking)
    failed = [f.rule for f in commonsense if not f.passed]
    if "within_world" in failed or "complete" in failed:
        hard = _all_failed(HARD, query, "not checked: the plan is not complete and in the world")
    else:
        hard = apply_rules(HARD, query, booking)
    soft = Soft()
    if not failed and all(finding.passed for finding in hard):
        soft = soft_scores(query, [[s for s in day.sights if s is not None] for day in booking])
    return Evaluation(None, commonsense, hard, coverage(query, booking), cost(query, booking), soft)


def _all_failed(rules: tuple[Rule, ...], query: Query, reason: str) -> tuple[Finding, ...]:
    return tuple(Finding(rule.name, False, reason) for rule in rules if rule.applies(query))


def _fraction(findings: Sequence[Finding]) -> float:
    return sum(finding.passed for finding in findings) / len(findings)


# Soft scores --------------------------------------------------------------------------------------


def culture_kinds(sight: Sight) -> frozenset[str]:
    """The kinds of culture that a sight is."""
    return frozenset(tag for tag in sight.tags if tag in CULTURE)


def interest_target(query: Query) -> int:
    """Sights of one interest that satisfy it: one sight a day, shared by the interests."""
    return math.ceil(query.days / len(query.interests))


def soft_scores(query: Query, days: Sequence[Sequence[Sight]]) -> Soft:
    """The soft scores of a plan that breaks no rule.

    Culture: one half is full at one sight of culture a day, the other at one new kind of it a day.
    Interests: the mean over the interests, each full at `interest_target`. Balance is full where
    all days have as many sights.

    Args:
        query: The customer's.
        days: The sights of each day.
    """
    sights = [sight for day in days for sight in day]
    kinds = frozenset[str]().union(*(culture_kinds(sight) for sight in sights))
    counts = [sum(matches(sight, interest) for sight in sights) for interest in query.interests]
    per_day = [len(day) for day in days]
    culture = sum(bool(culture_kinds(sight)) for sight in sights)
    target = interest_target(query)
    return Soft(
        0.5 * min(1.0, culture / query.days)
        + 0.5 * min(1.0, len(kinds) / min(query.days, len(CULTURE))),
        sum(min(1.0, count / target) for count in counts) / len(query.interests),
        1 - (max(per_day) - min(per_day)) / query.max_sights,
    )


# Metrics ------------------------------------------------------------------------------------------


def travelplanner_metrics(evaluations: Sequence[Evaluation]) -> dict[str, float]:
    """The metrics of TravelPlanner (arXiv:2402.01622, section 3.4) over the plans of many queries.

    Args:
        evaluations: One for each completion.

    Returns:
        delivery_rate: the fraction of completions with a plan. *_micro: rules that hold, of all
        that apply, in all plans together. *_macro: the fraction of completions for which all of
        them hold. final_pass_rate: the fraction for which all rules of both kinds hold.

    Raises:
        ValueError: There are no evaluations.
    """
    if not evaluations:
        raise ValueError("there are no evaluations to measure")
    count = len(evaluations)
    commonsense = [finding for e in evaluations for finding in e.commonsense]
    hard = [finding for e in evaluations for finding in e.hard]
    return {
        "delivery_rate": sum(e.delivered for e in evaluations) / count,
        "commonsense_micro": _fraction(commonsense),
        "commonsense_macro": sum(e.commonsense_passed for e in evaluations) / count,
        "hard_micro": _fraction(hard),
        "hard_macro": sum(e.hard_passed for e in evaluations) / count,
        "final_pass_rate": sum(e.passed for e in evaluations) / count,
    }
