"""The travel agency with tools: prices are looked up, the customer is asked, the trip is booked.

    task.name: travel_agency
    task.environment: cohort.rewards.travel.agency:Agency

Queries, rules and scores are those of the travel task; only the way to an itinerary differs. The
tables are not in the prompt, and some customers do not say at first what they like.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from typing import Any, Literal

from cohort.actors.plain import JsonObject
from cohort.actors.records import derive_seed
from cohort.rewards.base import per_completion
from cohort.rewards.config import RewardFunctionConfig
from cohort.rewards.environments.calls import hermes
from cohort.rewards.task import Row
from cohort.rewards.travel.demonstrations import varied_plan
from cohort.rewards.travel.plan import to_json
from cohort.rewards.travel.prompt import city_lines, instructions, sentence, taste, transport_lines
from cohort.rewards.travel.query import Query, from_columns
from cohort.rewards.travel.scores import Evaluation, evaluate, travelplanner_metrics
from cohort.rewards.travel.task import TravelTask

# What a question costs whose answer the customer has given already.
NEEDLESS_QUESTION = 0.05
# The share of customers who do not say at first what they like.
UNCLEAR = 0.5
UNSAID = "something special (ask me)"


class Agency:
    """The desk of a travel agency, for one customer.

    Attributes:
        booking: The plan that was booked, as JSON; None: nothing was.
        needless_questions: Questions whose answer was known.
        done: Whether the trip is booked: the episode ends with that.
    """

    def reset(self, query: dict[str, object], unclear: bool, **_: object) -> None:
        self._query = from_columns(query)
        self._unclear = unclear
        self.booking: str | None = None
        self.needless_questions = 0
        self.done = False

    def look_up(self, what: Literal["hotels", "food", "sights", "transport"], city: str) -> str:
        """Names and prices.

        Args:
            what: What to look for
            city: Where
        """
        names = {place.name.casefold(): place for place in self._query.country.cities}
        place = names.get(city.strip().casefold())
        if place is None:
            raise ValueError(
                f"no city {city!r}; there are {', '.join(p.name for p in names.values())}"
            )
        if what == "transport":
            return "\n".join(transport_lines(self._query)) or "none is needed"
        found = city_lines(self._query, place)
        if what not in found:
            raise ValueError(f"no {what!r}; there are {', '.join(found)}, transport")
        return found[what]

    def ask_customer(self, question: str) -> str:  # noqa: ARG002 - there is one answer
        """Ask the customer.

        Args:
            question: What to ask
        """
        if not self._unclear:
            self.needless_questions += 1
        self._unclear = False
        return f"I like {taste(self._query)}."

    def book(self, days: list[dict]) -> str:
        """Book the trip.

        Args:
            days: The days of the plan
        """
        self.booking = json.dumps({"days": days}, ensure_ascii=False)
        self.done = True
        return "Booked."


class AgencyTask(TravelTask):
    """Trips to book at an `Agency`.

    Args:
        seed: The run's.
        level: 1, the easiest, to 5.
        train_size: Training rows.
        eval_size: Held-out rows.

    Raises:
        TaskError: An option is wrong.
    """

    rewards = (RewardFunctionConfig(path="cohort.rewards.travel.agency:booked"),)

    def demonstration(self, row: Row, epoch: int) -> list[str]:
        """The replies of an episode: look up, ask where something is unclear, book."""
        query = from_columns(row.columns["query"])
        rng = random.Random(derive_seed(self._seed, "demonstration", row.id, epoch))
        replies = []
        for city in query.country.cities:
            what = ["food", "sights"] if query.days == 1 else ["hotels", "food", "sights"]
            replies.append(calls(*(("look_up", {"what": w, "city": city.name}) for w in what)))
        if query.several_cities:
            first = query.country.cities[0].name
            replies.append(calls(("look_up", {"what": "transport", "city": first})))
        if row.columns["unclear"]:
            replies.append(calls(("ask_customer", {"question": "What do you like most?"})))
        plan = varied_plan(query, rng)
        return [*replies, calls(("book", json.loads(to_json(plan))))]

    def metrics(self, rows: Sequence[Row], completions: Sequence[str]) -> dict[str, float]:
        """TravelPlanner's published metrics; one last reply for each row."""
        return travelplanner_metrics(
            [
                evaluate(from_columns(row.columns["query"]), booking_in(text))
                for row, text in zip(rows, completions, strict=True)
            ]
        )

    def _row(self, split: Literal["train", "eval"], index: int, size: int) -> Row:
        row = super()._row(split, index, size)
        query = from_columns(row.columns["query"])
        unclear = random.Random(derive_seed(self._seed, "unclear", row.id)).random() < UNCLEAR
        return Row(
            row.id,
            [{"role": "user", "content": request(query, unclear)}],
            {**row.columns, "unclear": unclear},
        )


def request(query: Query, unclear: bool) -> str:
    """What the customer says, and how to book.

    Args:
        query: The customer's.
        unclear: Leave out what the customer likes.
    """
    said = sentence(query, UNSAID if unclear else None)
    rules, _, form = instructions(query).partition("\nJSON only: ")
    return (
        f"{said}\nLook up prices, ask me if something is unclear, then book.\n{rules} book: {form}"
    )


def calls(*given: tuple[str, JsonObject]) -> str:
    """A reply that calls tools, as models write it whose template knows no tools.

    Example:
        >>> calls(("ask_customer", {"question": "Why?"}))
        '<tool_call>\\n{"name": "ask_customer", "arguments": {"question": "Why?"}}\\n</tool_call>'
    """
    written = (
        json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)
        for name, arguments in given
    )
    return "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in written)


def booking_in(text: str) -> str:
    """The plan that a reply books, as JSON; empty: none."""
    found = [
        arguments for name, arguments, error in hermes(text)[1] if name == "book" and not error
    ]
    return json.dumps(found[-1], ensure_ascii=False) if found else ""


@per_completion
def booked(
    query: Sequence[dict[str, object]], environments: Sequence[Any], **_: object
) -> list[dict[str, float]]:
    """The total of each booked plan, less what needless questions cost, with the parts.

    Args:
        query: The column of the task.
        environments: The agencies at the end of their episodes.

    Returns:
        For each completion `score`, its parts as `itinerary` gives them, and `needless_questions`.
    """
    found = []
    for columns, agency in zip(query, environments, strict=True):
        evaluation: Evaluation = evaluate(from_columns(columns), agency.booking or "")
        asked = float(agency.needless_questions)
        score = evaluation.total - NEEDLESS_QUESTION * asked
        found.append({"score": score, "needless_questions": asked, **evaluation.parts})
    return found
