"""Prompts as the model reads them: the tokens of messages and of plain texts."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Literal

from cohort.actors.records import Messages, Prompt
from cohort.rewards.task import Row, TaskError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Stands for the assistant's words while a template is asked where they go. Letters only: templates
# cut, strip and split what they print.
MARK = "TheAssistantsOwnWords"
# What templates of thinking models put before an answer without thinking.
EMPTY_THINKING = re.compile(r"<think>\s*</think>\s*")
# Arguments of apply_chat_template that are set here.
OURS = frozenset(
    {
        "self", "conversation", "messages", "chat_template", "add_generation_prompt",
        "continue_final_message", "tokenize", "padding", "truncation", "max_length",
        "return_tensors", "return_dict", "return_assistant_tokens_mask", "tokenizer_kwargs",
        "kwargs",
    }
)  # fmt: skip


class RenderError(TaskError):
    """The tokenizer cannot render a prompt; the message says why."""


class TokenizerRenderer:
    """A tokenizer with its chat template.

    template_arguments: given to the chat template, `{"enable_thinking": False}` for example.
    Raises RenderError for an argument that the template does not read.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template_arguments: Mapping[str, object] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._arguments = dict(template_arguments or {})
        template = _template_of(tokenizer, self._arguments)
        reads = set() if template is None else names_read(template)
        _check_arguments(self._arguments, template, reads, tokenizer)
        self._opens_answers = "add_generation_prompt" in reads
        self._appended: list[int] | None = None

    def plain(self, text: str) -> list[int]:
        """The tokens of a text, with one beginning-of-sequence token where the model has one.

        Tokens that a tokenizer appends (an end of sequence, a separator) are left out: what follows
        a prompt is the model's answer.
        """
        # A text that already starts with the special token must not get a second one.
        bos = self._tokenizer.bos_token
        special = not (bos and text.startswith(bos))
        ids = self._tokens(text, special)
        appended = self._appended_tokens()
        if special and appended and ids[-len(appended) :] == appended:
            return ids[: -len(appended)]
        return ids

    def chat(self, messages: Messages) -> list[int]:
        """The tokens of messages, up to where the assistant's words begin.

        A last message of the assistant is the beginning of its answer, and is continued: the prompt
        ends with exactly that text. The template is not shown it, for templates trim what they
        print, and take thinking out of it.
        """
        return self._tokens(self.chat_text(messages), special=False)

    def chat_text(self, messages: Messages) -> str:
        """The text whose tokens `chat` gives."""
        if not self._tokenizer.chat_template:
            raise RenderError(
                "the prompt is a list of messages, but the model's tokenizer has no chat "
                "template; use prompts that are plain strings, or a model with a chat template"
            )
        if messages and messages[-1]["role"] == "assistant":
            return self._header(messages) + messages[-1]["content"]
        if self._opens_answers:
            return self._apply(messages, add_generation_prompt=True)
        return self._opened(messages)

    def closed_text(self, messages: Messages) -> str:
        """Messages as the template writes them, with no answer opened behind them."""
        return self._apply(messages, add_generation_prompt=False)

    def tokens_of(self, text: str) -> list[int]:
        """The tokens of a text that a template wrote: nothing is added to it."""
        return self._tokens(text, special=False)

    def _header(self, messages: Messages) -> str:
        """What stands before the words of a last message of the assistant."""
        *before, last = messages
        rendered = self._apply([*before, {**last, "content": MARK}], add_generation_prompt=False)
        if rendered.count(MARK) != 1:
            raise RenderError(
                "the prompt ends in the assistant's words, and the chat template does not print "
                "them as they are, so they cannot be continued: leave that message out"
            )
        header = rendered.partition(MARK)[0]
        # Qwen3's template shows every last answer as one without thinking. Here it has begun only.
        if before and header.rstrip().endswith("</think>"):
            start = self._apply(before, add_generation_prompt=True)
            if header.startswith(start) and EMPTY_THINKING.fullmatch(header[len(start) :]):
                return start
        return header

    def _opened(self, messages: Messages) -> str:
        """The messages and the beginning of an answer, by a template that has no way to ask for it.

        Some need none: Mistral's answers follow the question as they are.
        """
        rendered = self._apply(messages, add_generation_prompt=True)
        try:
            header = self._header([*messages, {"role": "assistant", "content": ""}])
        except RenderError:
            return rendered
        # Only whitespace more belongs to the answer's first token.
        if header.startswith(rendered) and header[len(rendered) :].strip():
            return header
        return rendered

    def _apply(self, messages: Messages, *, add_generation_prompt: bool) -> str:
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages,
                    add_generation_prompt=add_generation_prompt,
                    tokenize=False,
                    **self._arguments,
                )
            )
        # Templates raise what they like: jinja errors, ValueError, TypeError.
        except Exception as error:
            raise RenderError(f"the chat template failed: {error}") from error

    def _tokens(self, text: str, special: bool) -> list[int]:
        try:
            return list(self._tokenizer(text, add_special_tokens=special)["input_ids"])
        # Half a surrogate, which is no text: each tokenizer says so with an error of its own.
        except Exception as error:
            raise RenderError(
                f"the tokenizer cannot read the prompt: {type(error).__name__}: {error}"
            ) from error

    def _appended_tokens(self) -> list[int]:
        """The tokens that the tokenizer adds after every text."""
        if self._appended is None:
            own, whole = self._tokens("a", special=False), self._tokens("a", special=True)
            starts = [i for i in range(len(whole)) if own and whole[i : i + len(own)] == own]
            self._appended = whole[starts[0] + len(own) :] if starts else []
        return self._appended


def names_read(template: str) -> set[str]:
    """The variables that a chat template reads from outside; empty when it is not a template."""
    import jinja2
    import jinja2.ext
    import jinja2.meta
    import jinja2.nodes
    import jinja2.parser

    class Generation(jinja2.ext.Extension):
        """transformers' own block around the assistant's words; here only its body matters."""

        tags = {"generation"}

        def parse(
            self, parser: jinja2.parser.Parser
        ) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = jinja2.Environment(extensions=[Generation, jinja2.ext.loopcontrols])
    try:
        tree = environment.parse(template)
    except jinja2.TemplateError:
        return set()
    return set(jinja2.meta.find_undeclared_variables(tree)) - set(environment.globals)


def _template_of(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, object]) -> str | None:
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several, by name
        return str(tokenizer.get_chat_template(tools=arguments.get("tools")))
    return template or None


def _check_arguments(
    arguments: Mapping[str, object],
    template: str | None,
    reads: set[str],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    if not arguments:
        return
    if template is None:
        raise RenderError(
            "model.template_arguments: the model's tokenizer has no chat template to read them"
        )
    functions = {"raise_exception", "strftime_now"}
    special = set(tokenizer.special_tokens_map)
    known = sorted(reads - OURS - functions - special)
    for name in arguments:
        if name in OURS:
            raise RenderError(f"model.template_arguments.{name}: not the template's; leave it out")
        if name not in reads:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it reads {', '.join(known) or 'none'}"
            raise RenderError(
                f"model.template_arguments.{name}: the model's chat template does not read it; "
                f"{hint}"
            )


class PromptRenderer:
    """Turns rows into prompts: the chat template is rendered here, once, to token ids.

    A last message of the assistant is the beginning of the answer: the model goes on from there.

    Args:
        tokenizer: A transformers tokenizer.
        max_prompt_tokens: The longest prompt that leaves room for a completion; None: no bound.
        template_arguments: Given to the chat template.
        on_overlong: What happens to a training prompt that is longer.
        conversation: Renders messages where an environment answers the model, with its tools; a
            prompt that is a text is a message of the user there. None: the chat template does.

    Raises:
        TaskError: The chat template does not read one of the arguments.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_prompt_tokens: int | None = None,
        template_arguments: Mapping[str, object] | None = None,
        on_overlong: Literal["error", "drop"] = "drop",
        conversation: Callable[[Messages], list[int]] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self.max_prompt_tokens = max_prompt_tokens
        self.on_overlong = on_overlong
        self._tokens = TokenizerRenderer(tokenizer, template_arguments)
        self._conversation = conversation

    def render(self, row: Row, epoch: int, cursor: int = 0) -> Prompt:
        """The prompt of a row; its id is the same after a resume. Never truncated.

        Args:
            row: What to render.
            epoch: Becomes a part of the prompt's id.
            cursor: The row's position, named in errors.

        Raises:
            TaskError: Messages without a chat template, a template that refuses them, a text that
                the tokenizer refuses, no tokens at all.
        """
        where = f"row {row.id} (epoch {epoch}, position {cursor})"
        content = row.content
        if self._conversation is not None and isinstance(content, str):
            content = [{"role": "user", "content": content}]
        try:
            if isinstance(content, str):
                token_ids = tuple(self._tokens.plain(content))
            else:
                token_ids = tuple((self._conversation or self._tokens.chat)(content))
        except RenderError as error:
            raise TaskError(f"{where}: {error}") from error
        if not token_ids:
            raise TaskError(f"{where}: the prompt has no tokens")
        text = self._tokenizer.decode(
            token_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        prompt_id = f"{epoch}-{row.id}"
        return Prompt(prompt_id, token_ids, content, dict(row.columns), epoch, text, row.source)

    def continuation(self, text: str) -> tuple[int, ...]:
        """The tokens with which the model would write `text` after a prompt, and stop.

        Raises:
            TaskError: The tokenizer has no end-of-sequence token.
        """
        # By itself: the template ends before the answer, and so does the last token of the prompt.
        token_ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        end = self._tokenizer.eos_token_id
        if end is None:
            raise TaskError("the model's tokenizer has no end-of-sequence token to stop at")
        return (*token_ids, end)
