"""How many rollout actors and reward workers a run has, changed while it runs: `cohort scale`.

The command leaves a request in the run directory, wherever that is shared from; the run's driver
takes it up at the end of a step, and leaves its answer beside it. No group is lost: newcomers join
when they have the newest weights, leavers end what they have begun or hand it back.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from cohort.cluster.config import Config, ConfigError, expand
from cohort.cluster.errors import RunError
from cohort.cluster.files import write_atomically
from cohort.cluster.placement import (
    Device,
    Resources,
    connected_cluster,
    engine_bytes,
    this_machine,
    too_many,
)
from cohort.cluster.run import Run
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
    while (answer := _read(folder / SCALE_ANSWER, Answer)) is None or answer.id != request.id:
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


async def scale_if_asked(run: Run) -> None:
    """Take up a request that somebody left in the run directory; errors are its answer."""
    folder = expand(run.config.run.dir)
    file = folder / SCALE_REQUEST
    if not file.is_file():
        return
    request = _read(file, Request)
    file.unlink(missing_ok=True)
    if request is None:
        run.console.note(f"{file} held no request of `cohort scale`, and was removed")
        return
    refusal = _refusal(run, request)
    answer = Answer(request.id, not refusal, refusal or await _scale(run, request))
    run.console.note(answer.text)
    try:
        write_atomically(folder / SCALE_ANSWER, json.dumps(asdict(answer)))
    except OSError as error:
        # What was asked for is done; a full disk ends no run.
        run.console.note(f"the answer to `cohort scale` could not be written: {error}")


async def _scale(run: Run, request: Request) -> str:
    """Begin what was asked for; what that is, in words."""
    said = []
    fleet, rewards = run.actors.pool.fleet, run.actors.rewards
    if request.actors is not None:
        said.append(f"rollout actors {len(fleet.staying)} -> {request.actors}")
        fleet.scale(request.actors)
    if request.rewards is not None:
        said.append(f"reward workers {rewards.count} -> {request.rewards}")
        await rewards.scale(request.rewards)
    return f"after step {run.progress.step}: {', '.join(said)}"


def _refusal(run: Run, request: Request) -> str:
    """Why the machines cannot hold it; empty when they can."""
    more = 0 if request.actors is None else request.actors - len(run.actors.pool.fleet.staying)
    one_machine = run.publisher.remote is False
    return why_not(
        run.config,
        request,
        more,
        run.actors.placement.device,
        connected_cluster(),
        run.learner.facts.parameters,
        this_machine().memory if one_machine else None,
    )


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


def _read(file: Path, kind: type[T]) -> T | None:
    """What a file of these holds; None when there is none, or something else in it."""
    try:
        return kind(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
