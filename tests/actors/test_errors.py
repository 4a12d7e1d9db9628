"""Every error that Ray may raise is sorted; a new one of Ray's makes the table fail."""

from __future__ import annotations

import inspect
import socket

import pytest
import ray.exceptions
from ray.exceptions import (
    ActorDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
)

from cohort.actors.errors import failure_of, kind_of, words

# What a mistake in a program raises. Everything else of Ray's is a loss.
BUGS = {"CrossLanguageError", "UnserializableException", "UserCodeException"}


def ray_errors() -> list[type[RayError]]:
    found = [item for _, item in inspect.getmembers(ray.exceptions, inspect.isclass)]
    return [item for item in found if issubclass(item, RayError) and item is not RayTaskError]


def task_error(cause: BaseException) -> RayTaskError:
    return RayTaskError("RolloutActor.sync", "Traceback: the actor's own", cause)


@pytest.mark.parametrize("kind", ray_errors(), ids=lambda item: item.__name__)
def test_every_error_of_ray_is_infra_but_those_that_a_program_makes(kind: type[RayError]) -> None:
    error = kind.__new__(kind)
    error.__dict__["_actor_init_failed"] = False
    assert kind_of(error) == ("bug" if kind.__name__ in BUGS else "infra")


@pytest.mark.parametrize(
    ("cause", "kind"),
    [
        (OutOfMemoryError("killed"), "infra"),
        (ObjectLostError("00" * 28, None, ""), "infra"),
        (MemoryError(), "infra"),
        (OSError(28, "No space left on device"), "infra"),
        (OSError(113, "No route to host"), "infra"),
        (OSError(116, "Stale file handle"), "infra"),
        (OSError(5, "Input/output error"), "infra"),
        (BlockingIOError(11, "Resource temporarily unavailable"), "infra"),
        (socket.gaierror(-3, "Temporary failure in name resolution"), "infra"),
        (RuntimeError("can't start new thread"), "infra"),
        (RuntimeError("something else"), "bug"),
        (TimeoutError(), "infra"),
        (ValueError("prompt too long"), "data"),
        (TypeError("not a list"), "data"),
        (KeyError("x"), "bug"),
        (AssertionError(), "bug"),
        (FileNotFoundError(2, "no such file"), "bug"),
        (RecursionError(), "bug"),
    ],
)
def test_what_an_actor_raised_is_sorted_by_its_cause(cause: BaseException, kind: str) -> None:
    assert kind_of(cause) == kind
    assert kind_of(task_error(cause)) == kind
    # As Ray raises it: an instance of both classes.
    assert kind_of(task_error(cause).as_instanceof_cause()) == kind


def test_an_actor_whose_constructor_raised_is_a_bug_and_one_that_died_is_not() -> None:
    assert kind_of(ActorDiedError(task_error(KeyError("x")))) == "bug"
    assert kind_of(ActorDiedError()) == "infra"


def test_a_cause_that_cannot_be_pickled_is_a_bug() -> None:
    class Unpicklable(Exception):
        def __reduce__(self) -> tuple[object, ...]:
            raise TypeError("no")

    assert kind_of(task_error(Unpicklable())) == "bug"


def test_the_actors_own_traceback_is_kept() -> None:
    failure = failure_of(task_error(KeyError("x")), "rollout-0 failed on group g")
    assert failure.kind == "bug"
    assert failure.what == "rollout-0 failed on group g"
    assert "the actor's own" in failure.message
    assert words(TimeoutError()) == "TimeoutError"


def test_words_of_what_ray_raises_hold_the_actors_traceback() -> None:
    """What `await` raises is of two types at once, and keeps its traceback in its text alone."""
    raised = task_error(KeyError("x")).as_instanceof_cause()
    assert "Traceback" in words(raised)
    assert words(raised) == words(task_error(KeyError("x")))
