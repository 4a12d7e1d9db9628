"""An environment of verifiers, and the agent that plays it at the endpoint."""

from __future__ import annotations

import os
import sys
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import verifiers.v1 as vf

import cohort


class SumData(vf.TaskData):
    answer: int


class SumTask(vf.Task[SumData, vf.State, vf.TaskConfig]):
    pass


class Sums(vf.Taskset[SumTask, vf.TasksetConfig]):
    def load(self) -> Iterator[SumTask]:
        yield SumTask(SumData(prompt="2 + 3?", answer=5), self.config.task)


class SumsConfig(vf.EnvConfig):
    player: vf.AgentConfig = vf.AgentConfig()


class SumsEnv(vf.Env[SumsConfig]):
    """Asks until the answer is right, three times at most."""

    async def run(self, task: Any, agents: Any) -> None:
        async with agents.player.interaction(task) as interaction:
            segment = await interaction.turn()
            tries = 1
            while segment.last_reply != str(task.data.answer) and tries < 3:
                segment = await interaction.turn("No. Again.")
                tries += 1
            right = segment.last_reply == str(task.data.answer)
        interaction.trace.record_reward("right", float(right) / tries, 1.0)


__all__ = ["Sums", "SumsEnv"]
# verifiers finds tasksets by the name of their module.
sys.modules["verifiers_sums"] = sys.modules[__name__]


class Verifiers(cohort.Agent):
    """Plays the environment's task as verifiers does, with Cohort's model."""

    def __init__(self) -> None:
        # "null" is the harness that only chats, as a program of its own.
        player = {"harness": {"id": "null"}, "runtime": {"type": "subprocess"}}
        self._env = vf.load_environment(
            SumsConfig(taskset=vf.TasksetConfig(id="verifiers_sums"), player=player)
        )

    async def run(self, row: Mapping[str, Any], base_url: str, api_key: str, model: str) -> float:
        # It reads keys from variables; each episode has its own.
        variable = f"EPISODE_{uuid.uuid4().hex}"
        os.environ[variable] = api_key
        context = vf.ModelContext(
            model=model, client=vf.EvalClientConfig(base_url=base_url, api_key_var=variable)
        )
        try:
            async with self._env.serving():
                (task,) = self._env.taskset
                episode = await self._env.run_episode(task, context)
        finally:
            del os.environ[variable]
        if not episode.ok:
            raise RuntimeError(f"verifiers: {episode.errors or episode.traces[0]}")
        return float(episode.traces[0].reward)
