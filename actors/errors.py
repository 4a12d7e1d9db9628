"""The one place where errors that crossed a process boundary are classified by their cause.

Every `await` of a Ray reference may raise. What it raises is sorted here, so that the loss of a
process, of its memory or of an object never ends a run, and a mistake in a program never costs
restarts.
"""

from __future__ import annotations

import errno
import socket

from cohort.actors.records import Failure
from cohort.actors.turns import FailureKind

# EX_TEMPFAIL: the same command may succeed when it is given again.
TRY_AGAIN = 75


class CohortError(Exception):
    """Base of every error whose message is meant for people: `cohort` prints it without a traceback
    and exits with `exit_code`.

    - CohortError
      - ConfigError: a key of the config, or its value (exit code 2)
      - TaskError: rows and prompts of a task
        - RenderError: a prompt that the tokenizer cannot render
      - RewardLoadError: a reward function that cannot be loaded
      - EnvironmentLoadError: an environment that cannot be loaded
      - PlacementError: the machines cannot hold the run
      - RunError: anything else that keeps a run from starting or going on
        - RayLostError: Ray's own processes are gone or did not start (exit code 75)
      - RolloutError, RewardPoolError: actors that fail again and again
      - LearnerError: ranks that fail again and again
        - LostGroups: groups of a step that were lost with a machine
      - TrainingError: a step that cannot be trained
      - CheckpointError: a checkpoint that cannot be written or read
        - NotFiniteError: weights with a NaN or an infinity, which are not saved
      - JournalError: a journal that cannot be written or read
      - ReportError, SubmitError: of the commands of these names

    Example:
        try:
            cohort.train(config)
        except cohort.CohortError as error:
            print(f"error: {error}")
    """

    exit_code = 1


# The machine is short of something now; the same work may succeed later or elsewhere.
SHORTAGES = frozenset(
    {errno.ENOMEM, errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EAGAIN}
)
# What Python says where the machine has no thread left.
NO_THREAD = "can't start new thread"
# A disk, a network file system or a network that does not work now, here.
OUTAGES = frozenset(
    {
        errno.EIO,
        errno.ESTALE,
        errno.EREMOTEIO,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.EHOSTDOWN,
        errno.EHOSTUNREACH,
    }
)


def kind_of(error: BaseException) -> FailureKind:
    """Sort an error that a call to an actor raised.

    "infra": the process, its node, its memory or an object is gone, or did not answer: the work may
    succeed elsewhere. "data": the actor refused this input (ValueError, TypeError): it fails
    wherever it runs. "bug": the actor's program is wrong, or could not be constructed.

    Example:
        >>> kind_of(TimeoutError())
        'infra'
        >>> kind_of(AttributeError("no such method"))
        'bug'
    """
    from ray.exceptions import (
        CrossLanguageError,
        RayActorError,
        RayError,
        RayTaskError,
        UnserializableException,
        UserCodeException,
    )

    if isinstance(error, RayTaskError):
        # Raised inside the actor. Ray replaces a cause that it cannot pickle by a plain RayError.
        cause = error.cause
        return "bug" if cause is None or type(cause) is RayError else kind_of(cause)
    if isinstance(error, RayActorError):
        return "bug" if error.actor_init_failed else "infra"
    if isinstance(error, (CrossLanguageError, UnserializableException, UserCodeException)):
        return "bug"
    if isinstance(error, (RayError, TimeoutError, ConnectionError, MemoryError)):
        return "infra"
    if isinstance(error, socket.gaierror) or str(error) == NO_THREAD:
        return "infra"
    if isinstance(error, OSError):
        return "infra" if error.errno in SHORTAGES | OUTAGES else "bug"
    return "data" if isinstance(error, (ValueError, TypeError)) else "bug"


def words(error: BaseException) -> str:
    """The error's type and message; for one that an actor's code raised, the actor's traceback."""
    from ray.exceptions import RayTaskError

    if isinstance(error, RayTaskError):
        # What Ray raises is also of the cause's type, and then tells the traceback in no other way.
        return str(error).strip()
    return f"{type(error).__name__}: {error}".strip(": ")


def failure_of(error: BaseException, what: str) -> Failure:
    """The error as a value.

    Args:
        error: What was raised.
        what: What was being done, in words, with the actor's name.
    """
    return Failure(kind_of(error), what, words(error))
