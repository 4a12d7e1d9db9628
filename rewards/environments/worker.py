"""EnvironmentWorker: a Ray actor that plays episodes in processes of its own.

The worker holds the tokenizer and the conversations; the user's environments run in a child process
with an environment of harmless variables and a bound on its memory. Where something in a process
hangs, new episodes go to a new one, and the old one is killed when its other episodes are done.
"""

from __future__ import annotations

import asyncio
import logging
import os
import platform
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from cohort.actors.engine import stop_token_ids
from cohort.actors.records import Prompt
from cohort.actors.turns import EpisodeEnd, EpisodeFailure, FinishReason, NextTurn
from cohort.rewards.continuation import Continuation, History
from cohort.rewards.environment import hide_environment, scrubbed_environment
from cohort.rewards.environments.base import EnvironmentLoadError
from cohort.rewards.environments.calls import find_parser
from cohort.rewards.environments.episode import Episode, Language, Limits
from cohort.rewards.environments.process import CallFailed, HostProcess, ProcessLost

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
# How long a process may take to show that its event loop is alive.
PING_S = 5.0
# Processes that start at one time for single episodes.
AT_ONCE = 4


@dataclass(frozen=True)
class EnvironmentSpec:
    """What a worker needs to play episodes.

    Attributes:
        path: `task.environment`.
        options: Keyword arguments of its class.
        tools: Schemas of its tools.
        model_path: The folder of the tokenizer.
        template_arguments: Given to the chat template.
        history: `task.history`.
        tool_parser: `environments.tool_parser`.
        limits: Of an episode.
        message_chars: Longest message of an environment; the rest is cut.
        memory_bytes: Of a process; None: no bound.
        secrets: Environment variables that the environments may see.
    """

    path: str
    options: Mapping[str, Any]
    tools: Sequence[dict[str, Any]]
    model_path: str
    template_arguments: Mapping[str, Any]
    history: History
    tool_parser: str
    limits: Limits
    message_chars: int
    memory_bytes: int | None
    secrets: tuple[str, ...] = ()


class EnvironmentWorker:
    """Plays episodes; see `cohort.actors.records.EpisodeHost` for the calls."""

    def __init__(self, spec: EnvironmentSpec) -> None:
        self._spec = spec
        self._process: HostProcess | None = None
        self._starting = asyncio.Lock()
        self._few = asyncio.Semaphore(AT_ONCE)
        self._episodes: dict[str, Episode] = {}
        self._language: Language | None = None
        hide_environment()

    async def check(self) -> str | None:
        """Load everything that episodes need, and make an instance; why that failed, or None."""
        try:
            self._loaded()
            await _construct(await self._current(), self._spec)
        except EnvironmentLoadError as error:
            return str(error)
        return None

    async def begin(
        self, episode_id: str, prompt: Prompt, seed: int, alone: bool
    ) -> NextTurn | EpisodeEnd:
        """See `EpisodeHost.begin`."""
        try:
            language = self._loaded()
            process = await (self._own() if alone else self._current())
        except (EnvironmentLoadError, OSError) as error:
            return EpisodeEnd("failed", failure=EpisodeFailure("infra", "start", str(error)))
        episode = Episode(episode_id, prompt, process, language, self._spec.limits)
        process.episodes.add(episode_id)
        self._episodes[episode_id] = episode
        return await self._after(episode, await episode.begin(seed))

    async def step(
        self, episode_id: str, token_ids: np.ndarray, finish_reason: FinishReason
    ) -> NextTurn | EpisodeEnd:
        """See `EpisodeHost.step`."""
        episode = self._episodes.get(episode_id)
        if episode is None:
            message = f"the worker of environments was started anew and has lost {episode_id}"
            return EpisodeEnd("failed", failure=EpisodeFailure("infra", "step", message))
        return await self._after(episode, await episode.step(token_ids, finish_reason))

    async def forget(self, episode_id: str) -> None:
        """See `EpisodeHost.forget`."""
        episode = self._episodes.get(episode_id)
        if episode is not None:
            await self._close(episode, tell=True)

    async def _after(
        self, episode: Episode, answer: NextTurn | EpisodeEnd
    ) -> NextTurn | EpisodeEnd:
        if episode.hangs:
            await self._retire(episode.process)
        if isinstance(answer, EpisodeEnd):
            # After a failure the environment was not closed yet.
            await self._close(episode, tell=answer.failure is not None and not episode.hangs)
        return answer

    async def _close(self, episode: Episode, tell: bool) -> None:
        process = episode.process
        self._episodes.pop(episode.name, None)
        process.episodes.discard(episode.name)
        if tell:
            try:
                await process.call(episode.name, "close", {}, self._spec.limits.step_timeout_s)
            except TimeoutError:
                await self._retire(process)
            except (CallFailed, ProcessLost):
                logger.info("episode %s was not closed properly", episode.name)
        if process.retired and not process.episodes:
            process.kill()

    async def _retire(self, process: HostProcess) -> None:
        """Give a process no new episodes; kill it now where its whole event loop hangs."""
        process.retired = True
        if self._process is process:
            self._process = None
        try:
            await process.call("", "ping", {}, PING_S)
        except (TimeoutError, ProcessLost):
            process.kill()

    async def _current(self) -> HostProcess:
        """The process that takes new episodes, started where there is none."""
        async with self._starting:
            if self._process is None or not self._process.alive:
                self._process = await start_process(self._spec)
            return self._process

    async def _own(self) -> HostProcess:
        """A process for one episode, which ends with it."""
        async with self._few:
            process = await start_process(self._spec)
        process.retired = True
        return process

    def _loaded(self) -> Language:
        if self._language is None:
            from transformers import AutoTokenizer

            spec = self._spec
            tokenizer = AutoTokenizer.from_pretrained(spec.model_path)
            stops = stop_token_ids(spec.model_path, tokenizer.eos_token_id)
            continuation = Continuation(
                tokenizer, spec.tools, spec.template_arguments, stops, spec.history
            )
            parser = find_parser(spec.tool_parser, tokenizer, spec.tools)
            self._language = Language(tokenizer, continuation, parser, stops)
        return self._language


async def start_process(spec: EnvironmentSpec) -> HostProcess:
    """A process that has loaded the class.

    Raises:
        EnvironmentLoadError: It could not.
    """
    unset = sorted(set(spec.secrets) - set(os.environ))
    if unset:
        raise EnvironmentLoadError(
            f"{', '.join(unset)}: not set in the environment of {platform.node()}, and named "
            "in environments.secrets"
        )
    hello = {
        "path": spec.path,
        "options": dict(spec.options),
        "memory_bytes": spec.memory_bytes,
        "message_chars": spec.message_chars,
    }
    shown = scrubbed_environment(os.environ, spec.secrets)
    return await HostProcess.start(hello, shown, START_TIMEOUT_S)


def try_environment(spec: EnvironmentSpec) -> None:
    """Make one instance in a process of its own, which ends then.

    Raises:
        EnvironmentLoadError: The class cannot be loaded or constructed.
    """

    async def tried() -> None:
        process = await start_process(spec)
        try:
            await _construct(process, spec)
        finally:
            process.kill()

    # In a loop of its own, because the caller may be in one.
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, tried()).result()


async def _construct(process: HostProcess, spec: EnvironmentSpec) -> None:
    limit = spec.limits.step_timeout_s
    try:
        await process.call("", "try", {}, limit)
    except (CallFailed, ProcessLost) as error:
        raise EnvironmentLoadError(str(error)) from error
    except TimeoutError:
        raise EnvironmentLoadError(
            f"task.environment={spec.path} was not constructed within {limit:g} s "
            "(environments.step_timeout_s)"
        ) from None
