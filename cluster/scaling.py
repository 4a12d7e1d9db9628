"""`cohort scale`: asks a run for other numbers of rollout actors and reward workers.

The command leaves a request in the run directory, wherever that is shared from; the run's driver
takes it up at the end of a step (`cluster/sizing.py`), and leaves its answer beside it.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from cohort.cluster.config import Config, ConfigError
from cohort.cluster.errors import RunError
from cohort.cluster.files import write_atomically
from cohort.cluster.placement import Device, Resources, engine_bytes, too_many
from cohort.cluster.run_dir import SCALE_ANSWER, SCALE_REQUEST, living_owner

POLL_S = 0.5
# Between two looks whether the run is still there.
LOOK_S = 5.0


@dataclass(frozen=True)
class Request:
    """What a run is asked for; None: as many as there are.

    Attributes:
        id: Of this request.
        actors: Rollout actors.
        rewards: Reward workers.
    """

    id: str
    actors: int | None = None
    rewards: int | None = None


@dataclass(frozen=True)
class Answer:
    """What became of a request.

    Attributes:
        id: Of the request.
        done: Whether it was taken up.
        text: What happened, or why it was not.
    """

    id: str
    done: bool
    text: str


T = TypeVar("T", Request, Answer)


def parse_counts(words: Sequence[str]) -> Request:
    """The request of the words `actors=3 rewards=2`.

    Raises:
        ConfigError: A word is something else, or there is none.

    Example:
        >>> parse_counts(["actors=3"]).actors
        3
    """
    counts: dict[str, int] = {}
    for word in words:
        name, _, number = word.partition("=")
        if name not in ("actors", "rewards") or not number.isdecimal() or not int(number):
            raise ConfigError(f"{word}: write actors=N or rewards=N, with N of 1 or more")
        counts[name] = int(number)
    if not counts:
        raise ConfigError("write actors=N or rewards=N, or both")
    return Request(uuid.uuid4().hex, counts.get("actors"), counts.get("rewards"))


def ask(folder: Path, request: Request, wait_s: float, say: Callable[[str], None]) -> None:
    """Leave a request in a run directory, and wait until the run has answered it.

    Args:
        folder: The run directory.
        request: What to ask for.
        wait_s: Longest wait, seconds.
        say: Told what happens, in lines.

    Raises:
        RunError: No run is alive there, it has ended meanwhile, has not answered in time, or
            refused.
    """
    if not (folder / "config.yaml").is_file():
        raise RunError(f"{folder} is not a run directory: it holds no config.yaml")
    owner = living_owner(folder)
    if owner is None:
        raise RunError(
            f"no run is alive in {folder}; the next one begins with what its command says: "
            "actors.count=N rewards.workers=M"
        )
    file = folder / SCALE_REQUEST
    write_atomically(file, json.dumps(asdict(request)))
    say(f"asked {owner}; it answers at the end of its step")
    began = looked = time.monotonic()
    while (
        answer := read_message(folder / SCALE_ANSWER, Answer)
    ) is None or answer.id != request.id:
        time.sleep(POLL_S)
        now = time.monotonic()
        if now - began > wait_s:
            raise RunError(
                f"no answer within {wait_s:g} s (--wait). The request stays in {file}, and is "
                "taken up at the end of the step"
            )
        if now - looked > LOOK_S:
            looked = now
            if living_owner(folder) is None:
                file.unlink(missing_ok=True)
                raise RunError(f"the run in {folder} ended before it took up the request")
    if not answer.done:
        raise RunError(answer.text)
    say(answer.text)


def why_not(
    config: Config,
    request: Request,
    more: int,
    device: Device,
    have: Resources,
    parameters: int,
    memory: int | None,
) -> str:
    """Why a request cannot be granted; empty when it can.

    Args:
        config: The run's, as it was started.
        request: What is asked for.
        more: Engines that would be started.
        device: That the run is on.
        have: What the machines have in all.
        parameters: Of the model.
        memory: Bytes that are free now, where all is on one machine; None: on several.
    """
    sections = {
        "actors": config.actors.model_copy(update={"count": request.actors or config.actors.count}),
        "rewards": config.rewards.model_copy(
            update={"workers": request.rewards or config.rewards.workers}
        ),
    }
    wanted = config.model_copy(update=sections)
    problems = too_many(wanted, have, device)
    need = more * engine_bytes(config, parameters)
    if device == "cpu" and memory is not None and need > memory:
        problems.append(
            f"{more} more engines need about {need / 2**30:.1f} GiB, and {memory / 2**30:.1f} GiB "
            "are free (actors.kv_cache_gib)"
        )
    return f"not scaled: {'; '.join(problems)}" if problems else ""


def read_message(file: Path, kind: type[T]) -> T | None:
    """What a file of these holds; None when there is none, or something else in it."""
    try:
        return kind(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
