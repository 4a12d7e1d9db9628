"""Config values: YAML 1.2, and each value read as the type of its key.

`read_yaml` keeps an unquoted scalar as its own text (`Plain`); `typed` then converts that text to
what the key takes. A text key therefore gets `010`, `no` or `2026-11-26` as written, a number key
gets numbers, and only where any value is allowed (`task.options`) does YAML 1.2's core schema
decide: true and false, null and ~, 10, 0x1f, 0o17, 1e-6, .inf. OmegaConf and pydantic both see a
value only after YAML has guessed its type, and so cannot do this.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from decimal import Decimal
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

Scalar = str | int | float | bool | None

NULLS = frozenset({"", "~", "null", "Null", "NULL"})
BOOLEANS = {
    "true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False,
}  # fmt: skip
INTEGER = re.compile(r"[-+]?[0-9]+")
PREFIXED = re.compile(r"0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
GROUPED = re.compile(r"(?<=[0-9])_(?=[0-9])")
MAX_INTEGER_DIGITS = 30
MAX_DEPTH = 100
TAG = "tag:yaml.org,2002:"
PLAIN, MERGE = "!plain", TAG + "merge"
QUOTE = "quote texts that hold brackets, commas, or a # after a space (a comment)"
# What a YAML error says -> what to do about it.
ADVICE = {
    "'\\t'": "indent with spaces, not tabs",
    "mapping values are not allowed": "put a text that holds ': ' in quotes",
    "expected ',' or": QUOTE,
    "stream end": QUOTE,
}


class ValueProblem(Exception):
    """A value cannot be read; the message says what to write instead."""


class Plain(str):
    """The text of an unquoted scalar.

    Attributes:
        comment: For an empty scalar, the comment that follows it on its line.
    """

    comment: str = ""


class _Loader(yaml.SafeLoader):
    """Reads unquoted scalars as `Plain`; a key that is given twice is an error."""

    def resolve(self, kind: type[yaml.Node], value: Any, implicit: Any) -> Any:
        if kind is yaml.ScalarNode and implicit[0]:
            return MERGE if value == "<<" else PLAIN
        return super().resolve(kind, value, implicit)

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                # PyYAML silently keeps the last one.
                raise _error(f"'{key.value}' is given twice", key)
            seen.add(key.value)
        return node

    def construct_plain(self, node: yaml.ScalarNode) -> Plain:
        plain = Plain(node.value)
        if not plain and node.start_mark.buffer is not None:
            rest = node.start_mark.buffer[node.start_mark.pointer :]
            found = re.match(r"[ \t]+(#[^\r\n\0]*)", rest)
            plain.comment = found[1].rstrip() if found else ""
        return plain

    def construct_core(self, node: yaml.ScalarNode) -> Scalar:
        """`!!int 3` and the like: the value must be what the tag says."""
        value, tag = core(node.value), node.tag.removeprefix(TAG)
        if {bool: "bool", int: "int", float: "float", NoneType: "null"}.get(type(value)) != tag:
            raise _error(f"'{node.value}' is no {tag}", node)
        return value


# The core schema's types and no others: no dates, sets or binary data.
_Loader.yaml_constructors = {
    PLAIN: _Loader.construct_plain,
    MERGE: _Loader.construct_plain,
    TAG + "str": yaml.SafeLoader.construct_yaml_str,
    TAG + "seq": yaml.SafeLoader.construct_yaml_seq,
    TAG + "map": yaml.SafeLoader.construct_yaml_map,
    **{TAG + name: _Loader.construct_core for name in ("null", "bool", "int", "float")},
    None: yaml.SafeLoader.construct_undefined,
}


def _error(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


def read_yaml(text: str) -> object:
    """Parse YAML without deciding the types of unquoted scalars.

    Returns:
        Lists, dicts and texts: `str` where quoted, `Plain` where not.

    Raises:
        ValueProblem: The text is not YAML; the message has line and column.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problem = error.problem or error.context or "not YAML"
        advice = next((f"; {what}" for known, what in ADVICE.items() if known in problem), "")
        raise ValueProblem(f"{place}{problem}{advice}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        message = f"line {line}: the character {error.character!r} is not allowed"
        raise ValueProblem(message) from error
    except yaml.YAMLError as error:
        raise ValueProblem(str(error)) from error
    except RecursionError as error:
        raise ValueProblem("nested too deeply") from error


def core(text: str) -> Scalar:
    """The value of an unquoted text by YAML 1.2's core schema (yaml.org/spec/1.2.2, 10.3.2)."""
    if text in NULLS:
        return None
    if text in BOOLEANS:
        return BOOLEANS[text]
    if INTEGER.fullmatch(text) and len(text) < 4000:  # Python refuses longer ones
        return int(text)
    if PREFIXED.fullmatch(text):
        return int(text, 0)
    if FLOAT.fullmatch(text):
        return float(text)
    if NOT_FINITE.fullmatch(text):
        return float(text.replace(".", ""))
    return str(text)


def _number(text: str, whole: bool) -> Scalar:
    """What a number key gets: a number if `text` is one, else the text.

    Besides YAML's numbers 1_000 and, for whole numbers, 1e3 and 8.0.
    """
    text = GROUPED.sub("", text.strip())
    value = core(text)
    if isinstance(value, (bool, NoneType)):
        return str(text)
    if whole and isinstance(value, float) and FLOAT.fullmatch(text):
        exact = Decimal(text)
        if exact.adjusted() < MAX_INTEGER_DIGITS and exact == exact.to_integral_value():
            return int(exact)
    return value


def typed(value: object, kind: object, where: str = "", depth: int = 0) -> object:
    """Convert every `Plain` in a parsed value to what its type annotation takes.

    A text that does not fit is left as it is, for pydantic to refuse in its own words.

    Args:
        value: What `read_yaml` returned.
        kind: A type annotation: a pydantic model, a container or a scalar type.
        where: The dotted key of the value, for messages.
        depth: How deeply the value is nested in what was read.

    Raises:
        ValueProblem: The value would be lost silently, or is nested too deeply.
    """
    if depth > MAX_DEPTH:
        raise ValueProblem(f"{where}: nested too deeply, or a YAML anchor that holds itself")
    optional, kind = _branch(kind, value)

    def inside(place: object, item: object) -> object:
        return typed(item, _item_kind(kind, place), f"{where}.{place}".lstrip("."), depth + 1)

    if isinstance(value, dict):
        plain = core if kind is Any else str
        return {
            plain(name) if isinstance(name, Plain) else name: inside(name, item)
            for name, item in value.items()
        }
    if isinstance(value, list):
        return [inside(place, item) for place, item in enumerate(value)]
    if not isinstance(value, Plain):
        return value
    if value in NULLS or (optional and value == "None"):
        if value.comment[1:2].strip() and kind in (str, Any):
            # `answer_after: ####`
            raise ValueProblem(
                f"{where}: the value is empty, for YAML takes '{value.comment}' as a comment; put "
                "it in quotes, or write null"
            )
        return None
    if kind is bool:
        return BOOLEANS.get(value.strip(), str(value))
    if kind in (int, float):
        return _number(value, whole=kind is int)
    if get_origin(kind) is Literal:
        return next((choice for choice in get_args(kind) if _means(value, choice)), str(value))
    if _is_container(kind) and value.lstrip()[:1] in ("[", "{", "("):
        return typed(read_yaml(_listed(value)), kind, where, depth + 1)
    return str(value) if kind is str else core(value)


def read_value(text: str, kind: object, where: str = "") -> object:
    """Read a value of the command line: YAML for lists and dicts, else the text as it is.

    Neither # nor ": " has a meaning outside of lists and dicts. Quotes around the whole make any
    value a text.

    Args:
        text: What follows `key=`.
        kind: The key's type annotation.
        where: The dotted key, for messages.

    Raises:
        ValueProblem: The value cannot be read.
    """
    bare = text.strip()
    if len(bare) > 1 and bare[0] in "\"'" and bare[0] == bare[-1]:
        with suppress(ValueProblem):
            if type(quoted := read_yaml(bare)) is str:
                return quoted
    _, branch = _branch(kind, None)
    opens = bare[:1] in ("[", "{")
    if _is_container(branch) or (branch is Any and opens):
        return typed(read_yaml(_listed(text)), kind, where)
    if opens and {"[": "]", "{": "}"}[bare[0]] not in bare:
        raise ValueProblem(f"'{bare[0]}' is never closed; put a text that begins so in quotes")
    return typed(Plain(text), kind, where)


def _listed(text: str) -> str:
    """A list in Python's round brackets as one in YAML's."""
    bare = text.strip()
    return f"[{bare[1:-1]}]" if bare.startswith("(") and bare.endswith(")") else text


def _branch(kind: object, value: object) -> tuple[bool, object]:
    """Whether a union may be None, and its part that takes such a value."""
    if get_origin(kind) not in (Union, UnionType):
        return False, kind
    parts = [part for part in get_args(kind) if part is not NoneType]
    scalar = isinstance(value, str)
    fitting = [part for part in parts if _is_container(part) != scalar]
    return NoneType in get_args(kind), (fitting or parts)[0]


def _is_container(kind: object) -> bool:
    return get_origin(kind) in (list, tuple, dict) or (
        isinstance(kind, type) and issubclass(kind, BaseModel)
    )


def _item_kind(kind: object, place: object) -> object:
    """The type of what stands at a place (a name or a number) inside a value of type `kind`."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        info = kind.model_fields.get(str(place))
        return Any if info is None else info.annotation
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is tuple and isinstance(place, int) and place < len(arguments):
        return arguments[place]
    return arguments[-1] if origin in (list, dict) else Any


def kind_at(kind: object, path: list[str]) -> object:
    """The type of the key at a path below `kind`; Any where there is no such key."""
    for name in path:
        kind = _item_kind(_branch(kind, None)[1], name)
    return kind


def _means(text: str, choice: object) -> bool:
    """Whether a text stands for a value of a Literal."""
    if isinstance(choice, str):
        return text.strip() == choice
    found = _number(text, whole=True)
    return type(found) is type(choice) and found == choice


class _Dumper(yaml.SafeDumper):
    """Writes what `read_yaml` and readers of YAML 1.1 read back the same."""

    def ignore_aliases(self, _: object) -> bool:
        return True


SAFE = re.compile(r"[A-Za-z_/][A-Za-z0-9_/.+-]*")
WORDS = NULLS | {"none", "true", "false", "yes", "no", "on", "off", "y", "n"}


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    safe = SAFE.fullmatch(text) and text.lower() not in WORDS
    return dumper.represent_scalar(TAG + "str", text, style=None if safe else '"')


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(tuple, yaml.SafeDumper.represent_list)


def write_yaml(tree: object) -> str:
    """YAML that `read_yaml` and `typed` read back the same."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 30)


def written(value: object) -> str:
    """A value as it can be typed after `key=` and written into a file."""
    if isinstance(value, str):
        return value
    return repr(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)
