"""Episodes with real environments in their real process; a test writes the model's replies."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import uvloop
from transformers import AutoTokenizer

from cohort.actors.engine import RawCompletion
from cohort.actors.play import Player
from cohort.actors.records import Completion, Group, Prompt, Request, SamplingSpec
from cohort.rewards.config import EnvironmentsConfig, TaskConfig
from cohort.rewards.environments.scores import environment_scores
from cohort.rewards.environments.specs import environment_spec
from cohort.rewards.environments.worker import EnvironmentSpec, EnvironmentWorker

HOSTILE = Path(__file__).parent / "hostile_environments.py"
MAX_LENGTH = 4096
Reply = str | list[int]


def spec_of(model: Path, name: str, **keys: Any) -> EnvironmentSpec:
    """name: of `task.environment`, or a class of hostile_environments.py."""
    own = ":" in name or name.islower()
    task = TaskConfig(
        environment=name if own else f"{HOSTILE}:{name}",
        environment_options=keys.pop("options", {}),
        history=keys.pop("history", "append"),
    )
    config = EnvironmentsConfig(**{"step_timeout_s": 3, **keys})
    return environment_spec(
        task, config, model_path=str(model), template_arguments={}, max_length=MAX_LENGTH
    )


class Table:
    """Plays episodes of one worker; the replies come from a list instead of an engine."""

    def __init__(self, model: Path, spec: EnvironmentSpec) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        self.worker = EnvironmentWorker(spec)
        self.contexts: list[list[int]] = []
        self.specs: list[SamplingSpec] = []

    # What the worker's handle does.

    async def begin(self, episode_id: str, prompt: Prompt, seed: int, alone: bool) -> Any:
        return await self.worker.begin(episode_id, prompt, seed, alone)

    async def step(
        self, episode_id: str, token_ids: np.ndarray, finish_reason: Any, logprobs: np.ndarray
    ) -> Any:
        return await self.worker.step(episode_id, token_ids, finish_reason, logprobs)

    def forget(self, episode_id: str) -> None:
        asyncio.get_running_loop().create_task(self.worker.forget(episode_id))

    def ids(self, reply: Reply) -> list[int]:
        if isinstance(reply, list):
            return reply
        return [*self.tokenizer(reply)["input_ids"], self.tokenizer.eos_token_id]

    def prompt(self, **columns: Any) -> Prompt:
        messages = [{"role": "user", "content": "Begin."}]
        ids = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        return Prompt("p", tuple(ids), messages, columns)

    async def play(
        self,
        replies: Sequence[Reply],
        index: int = 0,
        max_tokens: int = 64,
        seconds: float = 0.0,
        **columns: Any,
    ) -> Completion:
        """One episode in which the model says this, each reply after so many seconds; its last
        reply again and again."""
        left = iter(replies)
        said: list[Reply] = list(replies)

        async def sample(
            _name: str, token_ids: Sequence[int], spec: SamplingSpec, _greedy: bool
        ) -> tuple[RawCompletion, tuple[int, int]]:
            self.contexts.append(list(token_ids))
            self.specs.append(spec)
            await asyncio.sleep(seconds)
            ids = self.ids(next(left, said[-1]))[: spec.max_tokens]
            end = ids and ids[-1] == self.tokenizer.eos_token_id
            made = RawCompletion(
                np.asarray(ids), np.full(len(ids), -0.5, np.float32),
                "stop" if end else "length", spec.seed,
            )  # fmt: skip
            return made, (3, 4)

        request = Request("g", self.prompt(**columns), SamplingSpec(max_tokens, 1.0, 2, 17))
        text = lambda ids: self.tokenizer.decode(ids, skip_special_tokens=True)  # noqa: E731
        return await Player(request, index, self, sample, text, MAX_LENGTH, 3).play()

    def kill(self) -> None:
        """End the process of the environments."""
        if self.worker._process is not None:
            self.worker._process.kill()


def at_table_of(
    model: Path, name: str, body: Callable[[Table], Awaitable[Any]], **keys: Any
) -> Any:
    """Run a coroutine function with a Table: `at_table("Guess", body, max_turns=3)`."""
    spec = spec_of(model, name, **keys)

    async def main() -> Any:
        table = Table(model, spec)
        try:
            return await body(table)
        finally:
            table.kill()

    # The loop of Ray's actors.
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main())


def call(name: str, **arguments: Any) -> str:
    """A call of a tool as the model writes it."""
    written = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>{written}</tool_call>"


def results(made: Completion) -> list[str]:
    """What the tools have answered."""
    assert made.end is not None
    assert made.end.failure is None, made.end.failure
    return [message["content"] for message in made.end.messages if message["role"] == "tool"]


async def costs_its_own_episode(table: Any, how: str, kind: str, message: str) -> None:
    """What fails in one episode, `how` of its row, harms neither its neighbour nor the next."""
    bad, good = await asyncio.gather(
        table.play(["go"], how=how), table.play(["go"], index=1, how="is fine")
    )
    assert bad.end is not None and bad.end.failure is not None
    assert (bad.end.stop_reason, bad.end.failure.kind) == ("failed", kind)
    assert message in bad.end.failure.message
    # Nothing of it is trained, and nothing of it is a reward.
    assert len(bad.token_ids) == len(bad.turns) == 0
    assert good.end is not None and good.end.failure is None
    assert good.end.reward == 1.0
    rewards, errors = environment_scores(Group("g", table.prompt(), (bad, good)))
    assert rewards == (None, 1.0)
    (error,) = errors
    assert error.completion_id == bad.id and message in error.message
    again = await table.play(["go"], how="is fine")
    assert again.end is not None and again.end.reward == 1.0
