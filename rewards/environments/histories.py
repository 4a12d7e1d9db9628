"""What a request of an agent continues: the conversations of an episode, as messages and tokens.

An agent sends the whole conversation with each request. Where it is one that the model has read,
with the reply that it got and new messages behind, the next turn continues the very tokens that
were sampled. Any other history is rendered, and shares the first tokens of what it is most like:
a fork, which the learner trains without computing those tokens again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cohort.actors.plain import JsonObject
from cohort.rewards.continuation import Continuation, shared_prefix
from cohort.rewards.environments.base import Message

Tool = JsonObject


@dataclass(frozen=True)
class Continued:
    """What the next turn continues.

    Attributes:
        parent: The turn; None: the prompt.
        kept: Leading tokens of its sequence.
        context: All tokens that the model reads.
        told: The conversation as the chat template was given it.
        new: The messages that no earlier conversation has.
        fork: Whether a sequence of the episode is left.
        inexact: Whether the template would have written something else.
    """

    parent: int | None
    kept: int
    context: list[int]
    told: Sequence[Message]
    new: Sequence[Message]
    fork: bool
    inexact: bool

    @property
    def inserted(self) -> list[int]:
        """The tokens behind those that are kept."""
        return self.context[self.kept :]


@dataclass(frozen=True)
class _Turn:
    request: list[Message]
    tools: Sequence[Tool]
    found: Continued
    sampled: list[int]
    reply: Message

    @property
    def conversation(self) -> list[Message]:
        return [*self.request, self.reply]

    @property
    def sequence(self) -> list[int]:
        return [*self.found.context, *self.sampled]


class Histories:
    """The turns of one episode.

    Args:
        prompt: The messages of the row.
        prompt_ids: The same as tokens.
    """

    def __init__(self, prompt: Sequence[Message], prompt_ids: Sequence[int]) -> None:
        self._prompt = list(prompt)
        self._prompt_ids = list(prompt_ids)
        self._turns: list[_Turn] = []

    def find(
        self,
        request: list[Message],
        tools: Sequence[Tool],
        continuation: Continuation,
        shown: Callable[[Sequence[Message]], list[Message]],
    ) -> Continued:
        """What a request continues.

        Args:
            request: Its messages.
            tools: Schemas of its tools.
            continuation: Of these tools.
            shown: Messages as the model may read them.

        Raises:
            RenderError: The chat template refuses the messages.
        """
        known = [self._prompt, *(turn.conversation for turn in self._turns)]
        new = request[max(_shared(one, request) for one in known) :]
        answered = [
            (len(turn.request), index)
            for index, turn in enumerate(self._turns)
            if turn.tools == tools and _begins(turn.conversation, request)
        ]
        if answered:
            _, parent = max(answered)
            turn = self._turns[parent]
            more = shown(request[len(turn.conversation) :])
            extension = continuation.extend(
                turn.found.told, turn.found.context, turn.sampled, more, turn.reply
            )
            context = extension.sequence(turn.found.context, turn.sampled)
            told = [dict(message) for message in extension.messages]
            kept, inexact = extension.kept, extension.inexact
            return self._continued(parent, kept, context, told, new, inexact)
        for parent, turn in enumerate(self._turns):
            # Asked again: it is answered again, behind the same tokens.
            if turn.tools == tools and turn.request == request:
                context = turn.found.context
                return self._continued(parent, len(context), context, turn.found.told, new)
        told = shown(request)
        context = continuation.prompt_ids(told)
        sequences = [self._prompt_ids, *(turn.sequence for turn in self._turns)]
        shared = [shared_prefix(sequence, context) for sequence in sequences]
        most = shared.index(max(shared))
        return self._continued(most - 1 if most else None, shared[most], context, told, new)

    def add(
        self,
        request: list[Message],
        tools: Sequence[Tool],
        found: Continued,
        sampled: list[int],
        reply: Message,
    ) -> None:
        """Note the model's reply to a request."""
        self._turns.append(_Turn(request, tools, found, sampled, reply))

    def _continued(
        self,
        parent: int | None,
        kept: int,
        context: list[int],
        told: Sequence[Message],
        new: Sequence[Message],
        inexact: bool = False,
    ) -> Continued:
        whole = parent is not None and kept == len(self._turns[parent].sequence)
        fork = bool(self._turns) and not whole
        return Continued(parent, kept, context, told, new, fork, inexact)


def _begins(conversation: Sequence[Message], request: Sequence[Message]) -> bool:
    """Whether a request has a conversation and something new behind it."""
    return len(request) > len(conversation) == _shared(conversation, request)


def _shared(conversation: Sequence[Message], request: Sequence[Message]) -> int:
    """How many first messages are the same. Whitespace around a reply does not count: clients strip
    it."""
    return shared_prefix([_stripped(m) for m in conversation], [_stripped(m) for m in request])


def _stripped(message: Message) -> Message:
    if message["role"] != "assistant":
        return message
    return {**message, "content": message["content"].strip()}
