"""What an environment is: a class of the user, one instance an episode.

Three kinds. One has `reset` and `step` (`Env` shows both):

    class Guess:
        def reset(self, row, seed):
            self.number = random.Random(seed).randint(1, 9)
            return "I think of a number from 1 to 9."

        def step(self, reply):
            if reply.text.strip() == str(self.number):
                return Step("Right.", reward=1.0, done=True)
            return Step("No.", reward=0.0)

One has tools: its public methods, see `cohort.rewards.environments.tools`. And an `Agent` has a
loop of its own, and asks the model as it would ask OpenAI's. Methods may be `async`; the others run
in a thread each, so that a slow one holds up its own episode alone.

This module is what an environment's process imports: it must stay light.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cohort.actors.errors import CohortError
from cohort.actors.plain import JsonObject

Message = JsonObject


class EnvironmentLoadError(CohortError):
    """The environment cannot be loaded; the message names the key or the line to change."""


class EnvironmentFailed(Exception):
    """Raised by a tool whose episode is worth nothing, because a service that it needs is down.

    The episode is counted and not trained, as with `Step.failure`. Of any other exception the
    model is told, and the episode goes on.
    """


@dataclass(frozen=True)
class ToolCall:
    """One call of a tool, as the model wrote it.

    Attributes:
        name: Of the tool.
        arguments: By name.
        id: "call00000", "call00001", ... within the episode; Mistral's templates want nine letters.
        error: Why it cannot be made (its JSON is broken); None: it can.
    """

    name: str
    arguments: Mapping[str, object]
    id: str
    error: str | None = None


@dataclass(frozen=True)
class Reply:
    """What the model said in a turn.

    Attributes:
        text: All of it, special tokens included, end and padding left out.
        tool_calls: Those found in the text; `content` is what is left of it.
        content: The text without tool calls.
        token_ids: As sampled.
        stop_reason: "stop", or "length" where it was longer than actors.max_tokens.

    Example:
        An environment's `step` that wants a number:

            def step(self, reply: cohort.Reply) -> cohort.Step:
                if reply.stop_reason == "length":
                    return cohort.Step("Too long. Reply with a number only.", reward=-0.1)
                right = reply.text.strip() == self.answer
                return cohort.Step(reward=float(right), done=True)
    """

    text: str
    tool_calls: Sequence[ToolCall] = ()
    content: str = ""
    token_ids: Sequence[int] = ()
    stop_reason: str = "stop"


@dataclass
class Step:
    """What an environment answers.

    Attributes:
        messages: New messages, or a text that becomes one of the user. Empty: nothing was said; the
            model goes on with an empty message of the user.
        reward: For this turn; None: nothing to say about it.
        done: Whether the episode ends here.
        metrics: Numbers by name; the last of each name counts. None: nothing to say. At most 64
            names in an episode; one that Cohort counts itself becomes `environment/NAME`.
        failure: A text that says why the episode is worth nothing (a service was down): it is
            counted and not trained. Never a reward of 0.

    Example:
        cohort.Step("Higher.", reward=-0.1)
        cohort.Step("Right.", reward=1.0, done=True, metrics={"guesses": 3})
        cohort.Step(done=True, failure="the search engine did not answer")
    """

    messages: Sequence[Message] | str = ()
    reward: float | None = None
    done: bool = False
    metrics: Mapping[str, float] = field(default_factory=dict)
    failure: str | None = None


class Env:
    """An environment with turns of its own. To inherit from it is not needed.

    Example:
        See the top of this module.
    """

    async def reset(self, row: Mapping[str, Any], seed: int) -> Sequence[Message] | str | None:
        """Begin an episode.

        Args:
            row: The columns of the dataset's row, and `prompt`.
            seed: The same for all episodes of a group.

        Returns:
            Messages that follow the row's own prompt (a text becomes one of the user), or None.
        """
        raise NotImplementedError

    async def step(self, reply: Reply) -> Step:
        """Answer a reply of the model."""
        raise NotImplementedError

    async def close(self) -> None:
        """End the episode, however it ended."""


class Agent:
    """An environment that owns its loop: `run` asks the model at an OpenAI-compatible endpoint.

    To inherit from it is what makes a class an agent. Its requests are the turns of its episode. It
    may have `get_reward` and `close` as well, which are called at the end.

    Example:
        class Solver(cohort.Agent):
            async def run(self, row, base_url, api_key):
                client = AsyncOpenAI(base_url=base_url, api_key=api_key)
                asked = await client.chat.completions.create(
                    model="policy", messages=row["prompt"]
                )
                return float(asked.choices[0].message.content == row["answer"])
    """

    async def run(
        self, row: Mapping[str, Any], base_url: str, api_key: str, seed: int, model: str
    ) -> float | Mapping[str, float] | None:
        """Play an episode. A `run` of your own names those of the arguments that it wants.

        Args:
            row: The columns of the dataset's row, and `prompt`.
            base_url: Of the endpoint, which is reached from this machine only.
            api_key: This episode's own; it ends with the episode.
            seed: The same for all episodes of a group.
            model: What the endpoint calls the model: "policy".

        Returns:
            The episode's reward; or rewards by the `id` of completions; or None, where `get_reward`
            or reward functions give it.
        """
        raise NotImplementedError


def readable(text: str, longest: int) -> tuple[str, bool]:
    """A text as it can be given to a tokenizer, and whether it was cut at `longest` letters."""
    cut = len(text) > longest
    if cut:
        text = f"{text[:longest]}\n[{len(text) - longest} more characters were left out]"
    # A lone surrogate has no UTF-8.
    return text.encode(errors="replace").decode(), cut
