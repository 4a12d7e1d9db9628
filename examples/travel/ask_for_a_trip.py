"""Ask a served model for a trip, and print its itinerary with the scores of the travel task.

Serve an exported model first (`vllm serve runs/travel-export`, see deploy/README.md), then:

    python examples/travel/ask_for_a_trip.py
    python examples/travel/ask_for_a_trip.py --days 3 --budget 900 --cities Osaka --samples 16

Exit code: 0 when there is an itinerary to show, 1 when no answer holds one, 2 when there is no
answer: a trip that cannot be asked for, no server, a request that it refuses.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any, NoReturn

import openai
import typer

from cohort.rewards.travel.booking import BookedDay, book, cost
from cohort.rewards.travel.generate import trip
from cohort.rewards.travel.plan import parse_plan
from cohort.rewards.travel.prompt import messages, sentence
from cohort.rewards.travel.query import Query, QueryError
from cohort.rewards.travel.scores import MAX_TOTAL, Evaluation, evaluate
from cohort.rewards.travel.world import WEEKDAYS

PARTS = ("schema", "coverage", "commonsense", "hard", "passed", "culture", "interests", "balance")


def answers(url: str, model: str | None, query: Query, **sampling: Any) -> list[str]:
    """What the model says to the query, once a sample. Raises openai.OpenAIError."""
    # Servers of one's own need no key, but the client asks for one.
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    name = model or client.models.list().data[0].id
    reply = client.chat.completions.create(model=name, messages=messages(query), **sampling)  # type: ignore[arg-type]
    return [choice.message.content or "" for choice in reply.choices]


def table(evaluations: list[Evaluation]) -> str:
    """A line a sample: total, cost, parts; then why there is no plan, or which rules it breaks."""
    lines = [f"{'#':>3} {'total':>6} {'cost':>6} " + " ".join(f"{part:>11}" for part in PARTS)]
    for number, item in enumerate(evaluations, start=1):
        price = "-" if item.cost is None else f"${item.cost}"
        parts = " ".join(f"{item.parts[part]:11.2f}" for part in PARTS)
        lines.append(f"{number:3} {item.total:6.2f} {price:>6} {parts}  {_problem(item)}".rstrip())
    return "\n".join(lines)


def _problem(item: Evaluation) -> str:
    if item.schema_problem is not None:
        return f"no itinerary: {item.schema_problem}"
    broken = [finding.rule for finding in (*item.commonsense, *item.hard) if not finding.passed]
    return f"breaks {', '.join(broken)}" if broken else ""


def itinerary(query: Query, text: str) -> str:
    """The plan in an answer, day by day, with prices; names that do not exist are marked."""
    booking = book(query, parse_plan(text))
    lines = []
    for number, booked in enumerate(booking, start=1):
        weekday = WEEKDAYS[query.weekday(number - 1)]
        lines.append(f"Day {number}, {weekday}, {_printable(booked.day.city)}")
        lines += [f"  {what:<7} {shown}" for what, shown in _bookings(booked)]
    lines.append(f"In all ${cost(query, booking):,} of ${query.budget:,}, for {query.party}")
    return "\n".join(lines)


def _bookings(booked: BookedDay) -> list[tuple[str, str]]:
    day = booked.day
    found: list[tuple[str, str, Any]] = []
    if day.travel is not None:
        found.append(("travel", day.travel, booked.leg))
    found += [("meal", *pair) for pair in zip(day.meals, booked.meals, strict=True)]
    found += [("sight", *pair) for pair in zip(day.sights, booked.sights, strict=True)]
    if day.hotel is not None:
        found.append(("hotel", day.hotel, booked.hotel))
    rows = []
    for what, name, item in found:
        price = "not in the tables" if item is None else f"${item.price}"
        tags = f" ({', '.join(item.tags)})" if what == "sight" and item is not None else ""
        rows.append((what, f"{_printable(name)}: {price}{tags}"))
    return rows


def _printable(name: str) -> str:
    """A model may write what a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in name)


def main(
    url: Annotated[str, typer.Option(help="The server's API.")] = "http://127.0.0.1:8000/v1",
    model: Annotated[str | None, typer.Option(help="Its name there. Default: the first.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Answers to choose from.")] = 8,
    temperature: Annotated[float, typer.Option(min=0, help="0: the likeliest answer.")] = 1.0,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of one answer.")] = 1024,
    country: str = "Japan",
    cities: Annotated[str, typer.Option(help="Must be visited, by commas.")] = "Kyoto,Tokyo",
    days: int = 5,
    budget: Annotated[int, typer.Option(help="Dollars for all persons.")] = 2000,
    interests: Annotated[str, typer.Option(help="By commas.")] = "culture",
    party: Annotated[int, typer.Option(help="Persons.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the country's prices.")] = 0,
) -> None:
    """Ask a served model for a trip and print the best itinerary, with the scores of each."""
    try:
        query = trip(country, _names(cities), days, budget, _names(interests), party, seed)
        # No seed for sampling: with one, vLLM on CPUs dies where it reads a prompt in chunks.
        texts = answers(
            url, model, query, n=samples, temperature=temperature, max_tokens=max_tokens
        )
    except QueryError as error:
        _leave(f"this trip cannot be asked for: {error}")
    except openai.APIConnectionError:
        _leave(f"no server answers at {url}: start it (vllm serve MODEL), or give --url")
    except openai.OpenAIError as error:
        _leave(f"the server at {url} refused: {error}")
    print(sentence(query), end="\n\n")
    evaluations = [evaluate(query, text) for text in texts]
    print(table(evaluations), end="\n\n")
    best = max(range(len(texts)), key=lambda index: evaluations[index].total)
    if not evaluations[best].delivered:
        print(f"No answer holds an itinerary. The first one begins: {texts[0][:200]!r}")
        raise typer.Exit(1)
    print(f"The best is #{best + 1}, with {evaluations[best].total:.2f} of {MAX_TOTAL}:\n")
    print(itinerary(query, texts[best]))


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _leave(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise typer.Exit(2)


if __name__ == "__main__":
    typer.run(main)
