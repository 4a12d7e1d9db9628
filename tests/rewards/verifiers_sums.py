"""An environment of verifiers, which knows nothing of Cohort."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import verifiers.v1 as vf

__all__ = ["Sums", "SumsEnv"]


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
