"""The prompt of a dataset's row: columns that are JSON as text, templates, system messages."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import re
import string
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii
from typing import Any

from cohort.actors.records import Messages
from cohort.rewards.task import TaskError

Columns = Mapping[str, str | None]

# Ours: theirs. `answer` is what the built-in rewards compare with, `ground_truth` what verl's read.
LAYOUTS: dict[str, dict[str, str | None]] = {
    "trl": {},
    "verl": {"answer": "reward_model.ground_truth", "ground_truth": "reward_model.ground_truth"},
    "skyrl": {"answer": "reward_spec.ground_truth", "ground_truth": "reward_spec.ground_truth"},
    "openrlhf": {"prompt": "input", "answer": "label", "label": "label"},
}
# What a last message of the assistant is.
FINAL_ASSISTANT = ("auto", "continue", "demonstration")
# Columns that files without nested values (CSV) hold as text, by the field's conventions.
STRUCTURED = ("reward_model", "reward_spec", "extra_info")
# What messages look like as a text, in JSON or as Python and numpy print them.
BEGINS = re.compile(r"(?:array\s*)?\(?\s*\[?\s*\{")
KEY = re.compile(r"""["'](role|content|from|value)["']\s*:""")
# Of an object that stands for messages.
MESSAGE_KEYS = {"role", "content", "from", "messages", "conversations"}
LONGEST_LITERAL = 1_000_000


# Text that is JSON --------------------------------------------------------------------------------


def read_texts(values: dict[str, object], prompt: str, names: Collection[str], where: str) -> None:
    """Put lists and objects in place of columns that hold them as text, in JSON or as Python.

    Args:
        values: The row, changed in place.
        prompt: The column with the prompt; of its text, only messages are read.
        names: Columns that are looked into by a dotted path.
        where: The row's place, named in errors.

    Raises:
        TaskError: A text begins like one of these and cannot be read.
    """
    text = values.get(prompt)
    if type(text) is str:
        values[prompt] = _messages(text, prompt, where)
    for name in (*STRUCTURED, *names):
        text = values.get(name)
        if type(text) is str and name != prompt and (bare := _bare(text))[:1] == "{":
            values[name] = _read(bare, name, where)
    text = values.get("tests")
    if type(text) is str and (bare := _bare(text))[:1] in ("[", "{"):
        # A test may be code, which can begin like this too.
        strict = re.match(r"""\[?\s*\{\s*["']""", bare) is not None
        found = _read(bare, "tests", where, strict)
        values["tests"] = text if found is bare else found


def _messages(text: str, name: str, where: str) -> object:
    """The messages that a prompt's text stands for, or the text.

    Raises:
        TaskError: It stands for messages of another form, or cannot be read.
    """
    bare = _bare(text)
    if not BEGINS.match(bare):
        return text
    # A question may begin like this too, and then goes on in words.
    keys, whole = KEY.findall(bare), bare[-1] in "]})"
    sure = sum(key in ("role", "content") for key in keys) > 1
    sure = sure or (whole and ({"from", "value"} <= {*keys} or (keys != [] and bare[0] in "a(")))
    if not (sure or whole):
        return text
    found = _read(bare, name, where, sure)
    if isinstance(found, dict):
        sure = sure or bool(MESSAGE_KEYS & found.keys())
        found = [found] if sure else list(found.values())
    if not isinstance(found, list) or not found or not all(isinstance(m, dict) for m in found):
        return text
    try:
        return checked_prompt(found, where)
    except TaskError as error:
        raise TaskError(
            f"{error} (the column '{name}' is a text in JSON; task.options.json_texts=false keeps "
            "it a text)"
        ) from error


def _bare(text: str) -> str:
    """A text without what programs put around JSON: a mark of the byte order, quotes."""
    bare = text.strip().removeprefix("\ufeff").lstrip()
    if bare[:1] == '"':
        with contextlib.suppress(ValueError):
            return _bare(json.loads(bare))
    return bare


def _read(text: str, name: str, where: str, strict: bool = True) -> object:
    """What a text in JSON or Python means; if not strict, a text that cannot be read is itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        found = _literal(text)
        if found is None and strict:
            raise TaskError(
                f"{where}: the column '{name}' is a text that begins like JSON, but is not valid "
                f"JSON: {error}; write it as JSON, or set task.options.json_texts=false to keep "
                "the text"
            ) from error
        return text if found is None else found


def _literal(text: str) -> object:
    """The list or dict that a text is in Python, as `str` of pandas writes it; None for others."""
    if len(text) > LONGEST_LITERAL:
        return None
    try:
        found = ast.literal_eval(text.strip())
        # Only what JSON has a form for, keys included.
        return json.loads(json.dumps(found)) if isinstance(found, (list, dict)) else None
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return None


# Options ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RowOptions:
    """The options of the dataset task that say how a row is read; see `DatasetTask`.

    Attributes:
        fields: The columns that the template names.

    Raises:
        TaskError: An option has a value that it cannot have.
    """

    columns: Columns
    layout: str
    answer_after: str | None
    chat: bool
    system: str | None
    template: str | None
    fields: tuple[str, ...]
    final_assistant: str
    json_texts: bool

    def __post_init__(self) -> None:
        if not isinstance(self.columns, Mapping):
            raise TaskError(
                f"task.options.columns must be a mapping of ours: theirs, got {self.columns!r}"
            )
        for ours, theirs in self.columns.items():
            if not isinstance(ours, str) or not (theirs is None or isinstance(theirs, str)):
                raise TaskError(
                    f"task.options.columns: {ours!r}: {theirs!r} are not names of columns"
                )
        for name, text in (("answer_after", self.answer_after), ("system", self.system)):
            # A system message may be empty: some templates have one of their own otherwise.
            if not (text is None or isinstance(text, str)) or (name != "system" and text == ""):
                raise TaskError(f"task.options.{name} must be a text, not {text!r}")
        for name, choice in (("chat", self.chat), ("json_texts", self.json_texts)):
            if not isinstance(choice, bool):
                raise TaskError(f"task.options.{name} must be true or false, got {choice!r}")
        for name, value, known in (
            ("layout", self.layout, ("auto", *LAYOUTS)),
            ("final_assistant", self.final_assistant, FINAL_ASSISTANT),
        ):
            if value not in known:
                raise TaskError(f"task.options.{name}={value}: must be one of {', '.join(known)}")


def template_fields(template: str | None) -> tuple[str, ...]:
    """The columns that a template names.

    Only plain names in braces, because a format may reach into the objects that it prints.

    Raises:
        TaskError: The template has other fields, or none.
    """
    if template is None:
        return ()
    try:
        fields = [part[1:] for part in string.Formatter().parse(template) if part[1] is not None]
    except (ValueError, TypeError, AttributeError) as error:
        raise TaskError(f"task.options.template: {error} (double the braces of a text)") from error
    for name, form, conversion in fields:
        if not str(name).isidentifier() or form or conversion:
            raise TaskError(
                f"task.options.template: {{{name}}} is not the name of a column; double the braces "
                "of a text, as in \\boxed{{}}"
            )
    if not fields:
        raise TaskError(
            "task.options.template must have {prompt}, or name the columns that it is made of"
        )
    return tuple(dict.fromkeys(str(name) for name, _, _ in fields))


# Prompts ------------------------------------------------------------------------------------------


def checked_prompt(content: Any, where: str) -> str | Messages:
    """The prompt of a row, if it is a text or messages; see `_given` for their keys.

    Args:
        content: The row's prompt.
        where: The row's place, named in errors.

    Raises:
        TaskError: It is something else.
    """
    try:
        content = _given(content)
    except RecursionError as error:
        raise TaskError(f"{where}: 'prompt' is nested too deeply") from error
    if problem := _problem(content):
        raise TaskError(f"{where}: {problem}")
    return content


def _given(prompt: Any) -> Any:
    """Messages without keys that have no value.

    In a table, every message has the keys of all, and templates take a key for its value. One that
    only calls tools has an empty text.
    """
    if not isinstance(prompt, list):
        return prompt
    messages = [_without_nulls(message) for message in prompt]
    for message in messages:
        if isinstance(message, dict) and message.get("tool_calls") == []:
            del message["tool_calls"]
    for message in messages[:-1]:
        if isinstance(message, dict) and "tool_calls" in message:
            message.setdefault("content", "")
    return messages


def _without_nulls(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _problem(content: object) -> str | None:
    if isinstance(content, str):
        return None if content.strip() else "'prompt' is empty"
    if content is None:
        return "'prompt' is empty (null)"
    if not isinstance(content, list):
        return f"'prompt' must be a string or a list of messages, not a {type(content).__name__}"
    if not content:
        return "'prompt' is an empty list"
    for message in content:
        if not isinstance(message, dict):
            return f"a message must have role and content, not be a {type(message).__name__}"
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                return f"a message of 'prompt' has no text under '{name}'"
    return None


def content_of(
    prompt: str | Messages | None, columns: Mapping[str, object], how: RowOptions, where: str
) -> str | Messages:
    """What the model is asked: the prompt in its template, with the system message.

    Args:
        prompt: The row's own; None where the template makes it of columns.
        columns: All columns of the row that the template names.
        how: The options of the task.
        where: The row's place, named in errors.

    Raises:
        TaskError: The prompt, the template and the system message do not go together.
    """

    def filled(text: str | None) -> str:
        if how.template is None:
            return text or ""
        return how.template.format_map({**columns, "prompt": text})

    if prompt is None or isinstance(prompt, str):
        text = filled(prompt)
        if prompt is None and not text.strip():
            raise TaskError(f"{where}: 'prompt' is empty (task.options.template)")
        if not how.chat:
            if how.system is not None:
                raise TaskError(
                    f"{where}: a prompt that is a string has no system message: set "
                    "task.options.chat=true, or leave out task.options.system"
                )
            return text
        messages: Messages = [{"role": "user", "content": text}]
    else:
        messages = list(prompt)
        users = [at for at, message in enumerate(messages) if message["role"] == "user"]
        if how.template is not None:
            if not users:
                raise TaskError(f"{where}: no message of a user for task.options.template")
            last = messages[users[-1]]
            messages[users[-1]] = {**last, "content": filled(last["content"])}
    if how.system is None:
        return messages
    if messages[0]["role"] == "system":
        raise TaskError(f"{where}: has a system message already: leave out task.options.system")
    return [{"role": "system", "content": how.system}, *messages]


def prompt_digest(prompt: str | Messages) -> bytes:
    """A digest, the same for prompts that differ only in whitespace or in how the answer begins."""
    messages = [{"content": prompt}] if isinstance(prompt, str) else prompt
    if len(messages) > 1 and messages[-1].get("role") == "assistant":
        messages = messages[:-1]
    # As json.dumps writes it, which takes longer: this is done for every row.
    turns = ", ".join(
        f"[{_json_text(m.get('role'))}, {_json_text(' '.join(m['content'].split()))}]"
        for m in messages
    )
    return hashlib.blake2b(f"[{turns}]".encode(), digest_size=16).digest()


def _json_text(text: str | None) -> str:
    return "null" if text is None else encode_basestring_ascii(text)


def byte_length(content: str | Messages) -> int:
    """Bytes of a prompt's texts in UTF-8."""
    texts = [content] if isinstance(content, str) else [item["content"] for item in content]
    return sum(
        len(text) if text.isascii() else len(text.encode(errors="replace")) for text in texts
    )
