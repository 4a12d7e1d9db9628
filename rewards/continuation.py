"""Conversations of several turns as exact tokens: what follows a reply that the model has sampled.

Sampled ids are never rendered again. Their text, tokenised, is often not the ids that were sampled,
and a learner that trains other ids than the engine sampled trains on a wrong policy. So a reply
stays as it is, and only what comes after it is made here: the end of the turn where the model did
not write it, the new messages, and the beginning of the next answer. These inserted tokens have no
loss and no log-prob.

Whether the sequence is the one that the chat template would have given is not assumed, it is
compared each time. Templates rewrite what came before: Qwen3's drops the thinking of earlier turns,
DeepSeek-R1's everything before `</think>`, Llama's and Gemma's trim whitespace, Mistral's moves
the tools to the last question. `task.history` says what happens then:

- `append` (default): the new messages are appended all the same, with the family's own boundary
  tokens. The model sees everything that it wrote, and an episode is one sequence.
- `template`: the sequence forks. What the model reads next is the template's own rendering, as a
  server of chat completions would give it, and shares its first ids with the old sequence. Replies
  in it are only read; they are trained where they were sampled.

A template that cannot put the new messages behind the reply at all is a `RenderError`.

Tools, and templates that know none: `cohort.rewards.tool_messages`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cohort.actors.plain import JsonObject
from cohort.actors.text import prefill_of
from cohort.rewards.rendering import EMPTY_THINKING, MARK, RenderError, TokenizerRenderer
from cohort.rewards.tool_messages import (
    QUESTION,
    Message,
    supports_tools,
    tools_as_text,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

History = Literal["append", "template"]
# As MARK, for a new message.
ANOTHER = "SomebodyElsesWords"


@dataclass(frozen=True)
class Extension:
    """What the model reads next: the first `kept` ids of the old sequence, then `token_ids`.

    Attributes:
        token_ids: Inserted, all without loss and log-prob.
        kept: Leading ids of prompt + sampled that stay: all of them, except in a fork.
        messages: The conversation with the reply and the new messages: `before` of the next call.
        why: None when the sequence reads as the template writes the conversation; else where it
            does not, or in a fork where the old one did not.
        fork: The sequence is the template's own, and the old one is no part of it.

    Example:
        >>> extension = Extension((7, 8), 3, (), None, False)
        >>> extension.exact, extension.sequence([1, 2], [3])
        (True, [1, 2, 3, 7, 8])
    """

    token_ids: tuple[int, ...]
    kept: int
    messages: tuple[Message, ...]
    why: str | None
    fork: bool

    @property
    def exact(self) -> bool:
        """Appended, and proven to be what the template writes; see the class's example."""
        return self.why is None

    @property
    def inexact(self) -> bool:
        """Appended all the same where the template writes something else."""
        return self.why is not None and not self.fork

    def sequence(self, prompt_ids: Iterable[int], sampled_ids: Iterable[int]) -> list[int]:
        """What the engine reads next; see the class's example."""
        return [*[*prompt_ids, *sampled_ids][: self.kept], *self.token_ids]


class Continuation:
    """Extends the conversations of one tokenizer and one set of tools.

    Args:
        tokenizer: A transformers tokenizer with a chat template.
        tools: Schemas of the tools that the model may call.
        template_arguments: Given to the chat template.
        stop_ids: What the engine stops at; the tokenizer's end of sequence always is one.
        history: `task.history`, see the module.

    Raises:
        RenderError: No chat template, one that cannot render a question, an answer and a question,
            or one that does not read an argument.

    Example:
        >>> continuation = Continuation(tokenizer)
        >>> messages = [{"role": "user", "content": "What is 2 + 3?"}]
        >>> prompt = continuation.prompt_ids(messages)
        >>> sampled = tokenizer("5<|im_end|>")["input_ids"]
        >>> more = [{"role": "user", "content": "And 3 + 3?"}]
        >>> extension = continuation.extend(messages, prompt, sampled, more)
        >>> extension.exact, tokenizer.decode(extension.token_ids)
        (True, '\\n<|im_start|>user\\nAnd 3 + 3?<|im_end|>\\n<|im_start|>assistant\\n')
        >>> prompt, messages = extension.sequence(prompt, sampled), extension.messages
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tools: Sequence[Mapping[str, object]] | None = None,
        template_arguments: Mapping[str, object] | None = None,
        stop_ids: Collection[int] = (),
        history: History = "append",
    ) -> None:
        if not tokenizer.chat_template:
            raise RenderError(
                "the model's tokenizer has no chat template, and an episode of several turns needs "
                "one: use a model with a chat template, or a task of one turn"
            )
        self.native_tools = supports_tools(tokenizer, template_arguments)
        self._tokenizer = tokenizer
        self._tools = list(tools or ())
        self._history = history
        given = {"tools": self._tools} if self._tools and self.native_tools else {}
        self._renderer = TokenizerRenderer(tokenizer, {**(template_arguments or {}), **given})
        self._system = self._prints_system_messages()
        closings = self._closings()
        added = tokenizer.added_tokens_decoder
        # The template writes a token of its own at the end of a turn.
        self._closes = all(ids and ids[0] in added for ids in closings)
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        own = [ids[0] for ids in closings] if self._closes else eos
        self._end = own[:1]
        self._ends = {*stop_ids, *own, *eos}

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The tokens of a conversation, up to where the assistant's words begin.

        Raises:
            RenderError: The template refuses the messages.

        Example:
            >>> ids = Continuation(tokenizer).prompt_ids([{"role": "user", "content": "Hi"}])
            >>> tokenizer.decode(ids)[-35:]
            'Hi<|im_end|>\\n<|im_start|>assistant\\n'
        """
        return self._renderer.chat(self._shown(messages))

    def extend(
        self,
        before: Sequence[Message],
        prompt_ids: Sequence[int],
        sampled_ids: Sequence[int],
        new: Sequence[Message],
        reply: Message | None = None,
    ) -> Extension:
        """What follows a reply when the environment has answered it.

        The sequence is compared with the template's rendering of the conversation, with the reply
        as it was parsed, and as plain text (as it is, and without space in front). If it reads the
        same as one of them, the extension is exact.

        Args:
            before: The conversation that the reply answers. A last message of the assistant is the
                beginning of the reply.
            prompt_ids: What the engine read.
            sampled_ids: What it sampled, with the end token if it wrote one.
            new: The environment's messages, one or more: results of tools, messages of the user.
            reply: The assistant's message as it was parsed, tool calls and thinking in fields of
                their own; None: its plain text.

        Raises:
            RenderError: The template cannot put the new messages behind the reply.
            ValueError: No new messages.

        Example:
            >>> c = Continuation(tokenizer)
            >>> asked = [{"role": "user", "content": "What is 2 + 3?"}]
            >>> cut = tokenizer("The ans")["input_ids"]
            >>> go_on = [{"role": "user", "content": "Go on."}]
            >>> extension = c.extend(asked, c.prompt_ids(asked), cut, go_on)
            >>> tokenizer.decode(extension.token_ids)[:31]
            '<|im_end|>\\n<|im_start|>user\\nGo '
        """
        if not new:
            raise ValueError("no new messages: there is nothing to put after the reply")
        old = [*prompt_ids, *sampled_ids]
        end = sampled_ids[-1] if sampled_ids and sampled_ids[-1] in self._ends else None
        # Behind the prompt's last tokens: some tokenizers drop a space at the beginning of a text.
        tail = prompt_ids[-64:]
        opened = self._text(tail)
        words = self._text([*tail, *(sampled_ids if end is None else sampled_ids[:-1])])
        begun, words = prefill_of(before, opened), words[len(opened) :]
        if before and before[-1]["role"] == "assistant":
            before = before[:-1]
        texts = dict.fromkeys((begun + words, (begun + words).lstrip()))
        plain: list[Message] = [{"role": "assistant", "content": text} for text in texts]
        rendered: list[tuple[tuple[Message, ...], list[int]]] = []
        refusals: list[RenderError] = []
        # The parsed form first: some templates count turns, and Mistral's does not count calls.
        for form in plain if reply is None else [reply, *plain]:
            messages = (*before, form, *new)
            try:
                ids = self.prompt_ids(messages)
            except RenderError as error:
                refusals.append(error)
                continue
            # A truncated reply may be parsed to words that are not there yet.
            if ids[: len(old)] == old and (form is not reply or end is not None):
                return Extension(tuple(ids[len(old) :]), len(old), messages, None, False)
            rendered.append((messages, ids))
        appended: list[int] | None = None
        try:
            appended = self._appended(before, end, new, reply)
        except RenderError as error:
            refusals.append(error)
        ours = self._text([*old, *(appended or ())])
        theirs = [self._text(ids) for _, ids in rendered]
        if appended is not None and ours in theirs:
            messages = rendered[theirs.index(ours)][0]
            return Extension(tuple(appended), len(old), messages, None, False)
        # Its plain text if they are equally near: a parsed one may leave out what was written.
        nearest = max(reversed(theirs), key=lambda text: shared_prefix(ours, text), default=None)
        why = str(refusals[-1]) if nearest is None else first_difference(ours, nearest)
        if self._history == "template" and rendered:
            messages, ids = rendered[0]
            kept = shared_prefix(old, ids)
            return Extension(tuple(ids[kept:]), kept, messages, why, True)
        if self._history == "append" and appended is not None:
            messages = rendered[0][0] if rendered else (*before, reply or plain[0], *new)
            return Extension(tuple(appended), len(old), messages, why, False)
        other = "append" if self._history == "template" else "template"
        possible = rendered if self._history == "append" else appended is not None
        hint = f"; task.history={other} can" if possible else ""
        roles = ", ".join(str(message["role"]) for message in new)
        raise RenderError(
            f"task.history={self._history} cannot put the new messages ({roles}) after the "
            f"model's reply: {refusals[-1]}{hint}"
        )

    def example(self, before: Sequence[Message], reply: Message) -> list[int]:
        """How a model of this family would write a reply: the ids that it samples, end included.

        Example:
            >>> reply = {"role": "assistant", "content": "5"}
            >>> ids = Continuation(tokenizer).example([{"role": "user", "content": "Hi"}], reply)
            >>> tokenizer.decode(ids)
            '5<|im_end|>'
        """
        opened = self._renderer.chat_text(self._shown(before))
        thought = str(reply.get("thinking", ""))
        try:
            closed = self._renderer.closed_text(self._shown([*before, reply]))
        except RenderError:  # Llama 3.1's allows one call in a turn; a model can write more
            closed = ""
        text = closed.removeprefix(opened)
        if text == closed or thought not in text:
            text = f"<think>\n{thought}\n</think>\n\n" if thought else ""
            text += tools_as_text([reply])[0]["content"]
            text = text.removeprefix(prefill_of("", opened))
        elif empty := EMPTY_THINKING.match(text):
            # Qwen3's template shows every last answer as one without thinking.
            text = text[empty.end() :]
        # Behind the prompt, for some tokenizers put a space in front of a text.
        prompt = self._renderer.tokens_of(opened)
        ids = self._renderer.tokens_of(opened + text)[len(prompt) :]
        last = max((at for at, one in enumerate(ids) if one in self._ends), default=-1)
        return ids[: last + 1] if last >= 0 else [*ids, *self._end]

    def _shown(self, messages: Sequence[Message]) -> list[JsonObject]:
        """Messages as the template gets them."""
        if self.native_tools:
            return [dict(message) for message in messages]
        return tools_as_text(messages, self._tools, self._system)

    def _prints_system_messages(self) -> bool:
        """Gemma 2's template refuses them."""
        messages = [{"role": "system", "content": MARK}, QUESTION]
        try:
            return MARK in self._renderer.chat_text(messages)
        except RenderError:
            return False

    def _text(self, token_ids: Sequence[int]) -> str:
        """Token ids as text, every special token included."""
        return str(
            self._tokenizer.decode(
                list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )

    def _closings(self) -> tuple[list[int], list[int]]:
        """What the template writes behind an answer: a last one, and one with a question behind."""
        messages: list[Message] = [QUESTION, {"role": "assistant", "content": MARK}]
        last = self._renderer.closed_text(self._shown(messages))
        earlier = self._renderer.chat_text(self._shown([*messages, QUESTION]))
        if MARK not in last or MARK not in earlier:
            raise RenderError("the chat template does not print the assistant's words as they are")
        first, second = (text.rpartition(MARK)[2] for text in (last, earlier))
        return self._renderer.tokens_of(first), self._renderer.tokens_of(second)

    def _appended(
        self,
        before: Sequence[Message],
        end: int | None,
        new: Sequence[Message],
        reply: Message | None,
    ) -> list[int]:
        """What the template writes behind a reply of other words, without an end that is there."""
        mark = _unused(MARK, new)
        marked: list[Message] = [{"role": "assistant", "content": mark}]
        if reply is not None and reply.get("tool_calls"):
            # Some templates allow a tool's result behind a call only.
            *calls, last = reply["tool_calls"]
            function = {**last["function"], "arguments": {mark: mark}}
            calls = [*calls, {**last, "function": function}]
            marked.append({"role": "assistant", "content": "", "tool_calls": calls})
        refusal: RenderError | None = None
        for one in marked:
            try:
                tail = self._behind(mark, [*before, one], new)
                self._check_new(tail, mark, [*before, one], new)
            except RenderError as error:
                refusal = refusal or error
                continue
            ids = self._renderer.tokens_of(tail)
            if "tool_calls" in one:  # what closes the call stands between
                ids = ids[next((at for at, i in enumerate(ids) if i in self._ends), 0) :]
            # Another end than the template's stands for it: gpt-oss ends with <|return|>, and
            # earlier turns with <|end|>.
            if end is not None and ids and (ids[0] == end or self._closes):
                return ids[1:]
            return ids
        assert refusal is not None, "one at least was tried"
        raise refusal

    def _behind(self, mark: str, before: Sequence[Message], new: Sequence[Message]) -> str:
        """What the template writes behind the last mark."""
        _, found, tail = self._renderer.chat_text(self._shown([*before, *new])).rpartition(mark)
        if not found:
            raise RenderError("the chat template does not print the assistant's words")
        return tail

    def _check_new(
        self, tail: str, mark: str, before: Sequence[Message], new: Sequence[Message]
    ) -> None:
        """Refuse a template that puts a new message elsewhere: DeepSeek's moves those of the system
        to the front, which the model has read already."""
        for at, message in enumerate(new):
            if str(message.get("content") or "").strip() in tail:
                continue
            # Some write a result as JSON: then another text in its place is there, or is not.
            word = _unused(ANOTHER, new)
            other = [*new[:at], {**message, "content": word}, *new[at + 1 :]]
            if word not in self._behind(mark, before, other):
                role = message["role"]
                raise RenderError(f"the chat template puts the message of {role} elsewhere")


def _unused(word: str, messages: Sequence[Message]) -> str:
    """A word that is in none of the messages."""
    said = " ".join(str(message.get("content")) for message in messages)
    while word in said:
        word += "X"
    return word


def shared_prefix(first: Sequence[object], second: Sequence[object]) -> int:
    """How many leading items two sequences share.

    Example:
        >>> shared_prefix([1, 2, 3], [1, 2, 4, 5])
        2
    """
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(first), len(second)))


def first_difference(ours: str, theirs: str) -> str:
    """Where the sequence and the template's text part, in words.

    Example:
        >>> first_difference("1 + 1 = 2", "1 + 1 = 3")
        "after '1 + 1 = ' the sequence has '2', the template '3'"
    """
    at = shared_prefix(ours, theirs)
    before, mine, other = ours[max(0, at - 20) : at], ours[at : at + 40], theirs[at : at + 40]
    return f"after {before!r} the sequence has {mine!r}, the template {other!r}"
