"""EnvironmentWorker: a Ray actor that plays episodes in processes of its own.

The worker holds the tokenizer and the conversations; the user's environments run in a child process
with an environment of harmless variables and a bound on its memory. Where something in a process
hangs, new episodes go to a new one, and the old one is killed when its other episodes are done.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import platform
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cohort.actors.engine import stop_token_ids
from cohort.actors.plain import JsonObject
from cohort.actors.records import Prompt
from cohort.actors.turns import EpisodeEnd, EpisodeFailure, FinishReason, NextTurn
from cohort.rewards.continuation import Continuation, History
from cohort.rewards.environment import hide_environment, scrubbed_environment
from cohort.rewards.environments.agent_episode import AgentEpisode
from cohort.rewards.environments.base import EnvironmentLoadError
from cohort.rewards.environments.calls import find_parser
from cohort.rewards.environments.chat_server import LOOPBACK, ChatServer
from cohort.rewards.environments.episode import Episode, Language, Limits
from cohort.rewards.environments.process import CallFailed, HostProcess, ProcessLost

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0
# How long a process may take to show that its event loop is alive.
PING_S = 5.0
# Processes that start at one time for single episodes.
AT_ONCE = 4
# Sets of tools whose templates are kept ready.
LANGUAGES = 256


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
        agent: Whether they are agents with a loop of their own.
        temperature: Of the rollouts; agents cannot ask for another.
    """

    path: str
    options: Mapping[str, object]
    tools: Sequence[JsonObject]
    model_path: str
    template_arguments: Mapping[str, object]
    history: History
    tool_parser: str
    limits: Limits
    message_chars: int
    memory_bytes: int | None
    secrets: tuple[str, ...] = ()
    agent: bool = False
    temperature: float = 1.0


class EnvironmentWorker:
    """Plays episodes; see `cohort.actors.records.EpisodeHost` for the calls."""

    def __init__(self, spec: EnvironmentSpec) -> None:
        self._spec = spec
        self._process: HostProcess | None = None
        self._starting = asyncio.Lock()
        self._few = asyncio.Semaphore(AT_ONCE)
        self._episodes: dict[str, Episode | AgentEpisode] = {}
        self._tokenizer: PreTrainedTokenizerBase | None = None
        # By the tools: an agent's requests bring them.
        self._languages: dict[str, Language] = {}
        self._server: ChatServer | None = None
        hide_environment()

    async def check(self) -> str | None:
        """Load everything that episodes need, and make an instance; why that failed, or None."""
        try:
            self._language(self._spec.tools)
            await _construct(await self._current(), self._spec)
            if self._spec.agent:
                await self._serving()
        except (EnvironmentLoadError, OSError) as error:
            return str(error)
        return None

    async def begin(
        self, episode_id: str, prompt: Prompt, seed: int, alone: bool
    ) -> NextTurn | EpisodeEnd:
        """See `EpisodeHost.begin`."""
        # Those of an engine that died: it cannot say that nobody waits for them any more.
        played = episode_id.rpartition("/")[0]
        for left in [one for one in self._episodes.values() if one.name.startswith(f"{played}/")]:
            await self._close(left, tell=True)
        try:
            language = self._language(self._spec.tools)
            process = await (self._own() if alone else self._current())
            server = await self._serving() if self._spec.agent else None
        except (EnvironmentLoadError, OSError) as error:
            return EpisodeEnd("failed", failure=EpisodeFailure("infra", "start", str(error)))
        limits = self._spec.limits
        episode: Episode | AgentEpisode
        if server is None:
            episode = Episode(episode_id, prompt, process, language, limits)
        else:
            longest = self._spec.message_chars
            episode = AgentEpisode(
                episode_id, prompt, process, limits, self._language, server, longest
            )
        process.episodes.add(episode.key)
        self._episodes[episode_id] = episode
        return await self._after(episode, await episode.begin(seed))

    async def step(
        self,
        episode_id: str,
        token_ids: np.ndarray,
        finish_reason: FinishReason,
        logprobs: np.ndarray,
    ) -> NextTurn | EpisodeEnd:
        """See `EpisodeHost.step`."""
        episode = self._episodes.get(episode_id)
        if episode is None:
            message = f"the worker of environments was started again and has lost {episode_id}"
            return EpisodeEnd("failed", failure=EpisodeFailure("infra", "step", message))
        return await self._after(episode, await episode.step(token_ids, finish_reason, logprobs))

    async def forget(self, episode_id: str) -> None:
        """See `EpisodeHost.forget`."""
        episode = self._episodes.get(episode_id)
        if episode is not None:
            await self._close(episode, tell=True)

    async def _after(
        self, episode: Episode | AgentEpisode, answer: NextTurn | EpisodeEnd
    ) -> NextTurn | EpisodeEnd:
        if episode.hangs:
            await self._retire(episode.process)
        if isinstance(answer, EpisodeEnd):
            # After a failure the environment was not closed yet.
            await self._close(episode, tell=answer.failure is not None and not episode.hangs)
        return answer

    async def _close(self, episode: Episode | AgentEpisode, tell: bool) -> None:
        process = episode.process
        episode.end()
        # One that was forgotten is closed already, and another may have its name by now.
        if self._episodes.get(episode.name) is episode:
            del self._episodes[episode.name]
            process.episodes.discard(episode.key)
            if tell:
                await self._tell(episode)
        if process.retired and not process.episodes:
            process.kill()

    async def _tell(self, episode: Episode | AgentEpisode) -> None:
        """Close the environment of an episode that did not come to its own end."""
        # What it failed at may be what `get_reward` needs, and nobody would read its reward.
        limit, forget = self._spec.limits.step_timeout_s, {"score": False}
        try:
            await episode.process.call(episode.key, "close", forget, limit)
        except TimeoutError:
            await self._retire(episode.process)
        except (CallFailed, ProcessLost):
            logger.info("episode %s was not closed properly", episode.name)

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

    async def _serving(self) -> ChatServer:
        """Where agents ask the model."""
        async with self._starting:
            if self._server is None:
                server = ChatServer(self._spec.temperature)
                await server.start()
                self._server = server
            return self._server

    def _language(self, tools: Sequence[JsonObject]) -> Language:
        """How conversations with these tools are read and written.

        Raises:
            RenderError: The chat template cannot be used with them.
            EnvironmentLoadError: There is no such parser of calls.
        """
        key = json.dumps(tools)
        if key in self._languages:
            return self._languages[key]
        from transformers import AutoTokenizer

        spec = self._spec
        if self._tokenizer is None:
            self._tokenizer = AutoTokenizer.from_pretrained(spec.model_path)
        tokenizer = self._tokenizer
        stops = stop_token_ids(spec.model_path, tokenizer.eos_token_id)
        continuation = Continuation(tokenizer, tools, spec.template_arguments, stops, spec.history)
        parser = find_parser(spec.tool_parser, tokenizer, tools)
        if len(self._languages) >= LANGUAGES:
            self._languages.pop(next(iter(self._languages)))
        self._languages[key] = Language(tokenizer, continuation, parser, stops)
        return self._languages[key]


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
    if spec.agent:
        # A proxy does not lead to this machine.
        for name in ("NO_PROXY", "no_proxy"):
            shown[name] = ",".join(filter(None, (shown.get(name), LOOPBACK)))
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
