"""Config values: YAML 1.2, and each value read as the type of its key.

Two steps. `read_yaml` keeps what stands without quotes as its own text (`Plain`); `typed` then
turns that text into what the key takes. So a text key gets `010`, `no` or `2026-11-26` as they
are written, a number key gets numbers, and only where any value is allowed (`task.options`) do the
rules of YAML 1.2's core schema decide: true and false, null and ~, 10, 0x1f, 0o17, 1e-6, .inf.
"""

from __future__ import annotations

import json
import re
from decimal import Decimal
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

NULLS = frozenset({"", "~", "null", "Null", "NULL"})
BOOLEANS = {word: word.lower() == "true" for word in ("true", "True", "TRUE", "false", "False")}
BOOLEANS["FALSE"] = False
INTEGER = re.compile(r"[-+]?[0-9]+")
OCTAL, HEXADECIMAL = re.compile(r"0o[0-7]+"), re.compile(r"0x[0-9a-fA-F]+")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
NOT_FINITE = re.compile(r"([-+]?)\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
GROUPED = re.compile(r"(?<=[0-9])_(?=[0-9])")
MAX_INTEGER_DIGITS = 30
MAX_DEPTH = 100
TAG = "tag:yaml.org,2002:"
PLAIN, MERGE = "!plain", TAG + "merge"


class ValueProblem(Exception):
    """A value cannot be read; the message says what to write instead."""


class Plain(str):
    """The text of a value that stands without quotes.

    comment: for an empty one, what follows it on its line as a comment.
    """

    comment: str = ""


class _Loader(yaml.SafeLoader):
    """Reads plain scalars as `Plain`; a key that is given twice is an error."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        if kind is yaml.ScalarNode and implicit[0]:
            return MERGE if value == "<<" else PLAIN
        return super().resolve(kind, value, implicit)

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in seen:
                # PyYAML keeps the last one without a word.
                raise yaml.constructor.ConstructorError(
                    None, None, f"'{key.value}' is given twice", key.start_mark
                )
            seen.add(key.value)
        return node

    def construct_plain(self, node: yaml.ScalarNode) -> Plain:
        plain = Plain(node.value)
        if not plain and node.start_mark.buffer is not None:
            rest = node.start_mark.buffer[node.start_mark.pointer :]
            found = re.match(r"[ \t]+(#[^\r\n\0]*)", rest)
            plain.comment = found[1].rstrip() if found else ""
        return plain

    def construct_core(self, node: yaml.ScalarNode) -> Any:
        """`!!int 3` and the like: the value must be what the tag says."""
        value = core(Plain(node.value))
        names = {bool: "bool", int: "int", float: "float", NoneType: "null"}
        if names.get(type(value)) != node.tag.removeprefix(TAG):
            raise yaml.constructor.ConstructorError(
                None, None, f"'{node.value}' is no {node.tag.removeprefix(TAG)}", node.start_mark
            )
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


def read_yaml(text: str) -> Any:
    """Lists, dicts, texts (str where quoted, `Plain` where not).

    Raises ValueProblem, with line and column, for a text that is not YAML.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueProblem(f"{place}{_in_words(error)}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueProblem(f"line {line}: the character {error.character!r} is not allowed") from (
            error
        )
    except yaml.YAMLError as error:
        raise ValueProblem(str(error)) from error
    except RecursionError as error:
        raise ValueProblem("nested too deeply") from error


def _in_words(error: yaml.MarkedYAMLError) -> str:
    problem = error.problem or error.context or "not YAML"
    if "'\\t'" in problem:
        return f"{problem}; indent with spaces, not tabs"
    if "mapping values are not allowed" in problem:
        return f"{problem}; put a text that holds ': ' in quotes"
    if "expected ',' or" in problem or "stream end" in problem:
        return (
            f"{problem}; quote texts that hold brackets, commas, or a # after a space (a comment)"
        )
    return problem


def core(text: str) -> Any:
    """The value of an unquoted text by YAML 1.2's core schema."""
    if text in NULLS:
        return None
    if text in BOOLEANS:
        return BOOLEANS[text]
    if OCTAL.fullmatch(text):
        return int(text[2:], 8)
    if HEXADECIMAL.fullmatch(text):
        return int(text, 16)
    if INTEGER.fullmatch(text) and len(text) < 4000:  # Python refuses longer ones
        return int(text)
    return _float(text)


def _float(text: str) -> Any:
    if FLOAT.fullmatch(text):
        return float(text)
    if found := NOT_FINITE.fullmatch(text):
        return float("nan") if found[1] is None else float(f"{found[1]}inf")
    return str(text)


def _number(text: str, whole: bool) -> Any:
    """The number that a number key gets; the text itself where it is none.

    Beside YAML's numbers 1_000, and for whole numbers 1e3 and 8.0.
    """
    text = GROUPED.sub("", text.strip())
    value = core(text)
    if isinstance(value, (bool, NoneType)):
        return str(text)
    if not whole or not isinstance(value, float) or not FLOAT.fullmatch(text):
        return value
    exact = Decimal(text)
    if exact.adjusted() < MAX_INTEGER_DIGITS and exact == exact.to_integral_value():
        return int(exact)
    return value


def typed(value: Any, kind: Any, where: str = "", depth: int = 0) -> Any:
    """What `read_yaml` gave, with every `Plain` turned into what `kind`, a type annotation, takes.

    A plain text that does not fit is left as text, for pydantic to refuse in its own words.
    Raises ValueProblem, naming the key (`where`), for a value that would be lost silently.
    """
    if depth > MAX_DEPTH:
        raise ValueProblem(f"{where}: nested too deeply, or a YAML anchor that holds itself")
    optional, kind = _branch(kind, value)
    if isinstance(value, dict):
        return {
            _key(name, kind): typed(item, _item_kind(kind, name), _below(where, name), depth + 1)
            for name, item in value.items()
        }
    if isinstance(value, list):
        return [
            typed(item, _item_kind(kind, place), _below(where, place), depth + 1)
            for place, item in enumerate(value)
        ]
    if not isinstance(value, Plain):
        return value
    if value in NULLS or (optional and value == "None"):
        if value.comment[1:2].strip() and (kind is str or kind is Any):
            # `answer_after: ####`
            raise ValueProblem(
                f"{where}: the value is empty, for YAML takes '{value.comment}' as a comment; put "
                "it in quotes, or write null"
            )
        return None
    if kind is Any:
        return core(value)
    if kind is bool:
        return BOOLEANS.get(value.strip(), str(value))
    if kind in (int, float):
        return _number(value, whole=kind is int)
    if get_origin(kind) is Literal:
        same = (choice for choice in get_args(kind) if _means(value, choice))
        return next(same, str(value))
    if _is_container(kind) and value.lstrip()[:1] in ("[", "{", "("):
        return typed(read_yaml(_listed(value)), kind, where, depth + 1)
    return str(value) if kind is str else core(value)


def read_value(text: str, kind: Any, where: str = "") -> Any:
    """A value of the command line: for lists and dicts YAML, else the text as it is.

    Neither # nor ": " has a meaning outside of lists and dicts. Quotes around the whole make any
    value a text. Raises ValueProblem for what cannot be read.
    """
    _, branch = _branch(kind, None)
    bare = text.strip()
    if (quoted := _unquoted(bare)) is not None:
        return quoted
    opens = bare[:1] in ("[", "{")
    if _is_container(branch) or (branch is Any and opens):
        return typed(read_yaml(_listed(text)), kind, where)
    if opens and {"[": "]", "{": "}"}[bare[0]] not in bare:
        raise ValueProblem(f"'{bare[0]}' is never closed; put a text that begins so in quotes")
    return typed(Plain(text), kind, where)


def _unquoted(text: str) -> str | None:
    """The text between quotes that hold all of it; None for any other."""
    if len(text) < 2 or text[0] not in "\"'" or text[0] != text[-1]:
        return None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError:
        return None
    return node.value if isinstance(node, yaml.ScalarNode) else None


def _listed(text: str) -> str:
    """A list in Python's round brackets as one in YAML's."""
    bare = text.strip()
    return f"[{bare[1:-1]}]" if bare.startswith("(") and bare.endswith(")") else text


def _branch(kind: Any, value: Any) -> tuple[bool, Any]:
    """Whether a union may be None, and its part that takes such a value."""
    if get_origin(kind) not in (Union, UnionType):
        return False, kind
    parts = [part for part in get_args(kind) if part is not NoneType]
    scalar = isinstance(value, str)
    fitting = [part for part in parts if _is_container(part) != scalar]
    return NoneType in get_args(kind), (fitting or parts)[0]


def _is_container(kind: Any) -> bool:
    return get_origin(kind) in (list, tuple, dict) or (
        isinstance(kind, type) and issubclass(kind, BaseModel)
    )


def _key(name: Any, kind: Any) -> Any:
    if not isinstance(name, Plain):
        return name
    return core(name) if kind is Any else str(name)


def _item_kind(kind: Any, place: Any) -> Any:
    """The type of what stands at a place (a name or a number) inside a value of this type."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        info = kind.model_fields.get(place)
        return Any if info is None else info.annotation
    arguments = get_args(kind)
    if get_origin(kind) is dict:
        return arguments[1]
    if get_origin(kind) is list:
        return arguments[0]
    if get_origin(kind) is tuple and isinstance(place, int) and place < len(arguments):
        return arguments[place]
    return Any


def kind_at(kind: Any, path: list[str]) -> Any:
    """The type of the key at a path below `kind`; Any where there is no such key."""
    for name in path:
        kind = _item_kind(_branch(kind, None)[1], name)
    return kind


def _means(text: str, choice: Any) -> bool:
    if isinstance(choice, str):
        return text.strip() == choice
    found = _number(text, whole=True)
    return type(found) is type(choice) and found == choice


def _below(where: str, place: Any) -> str:
    return f"{where}.{place}" if where else str(place)


class _Dumper(yaml.SafeDumper):
    """Writes what `read_yaml` and YAML 1.1 read back the same."""

    def ignore_aliases(self, _: Any) -> bool:
        return True


SAFE = re.compile(r"[A-Za-z_/][A-Za-z0-9_/.+-]*")
WORDS = NULLS | {"none", "true", "false", "yes", "no", "on", "off", "y", "n"}


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    safe = SAFE.fullmatch(text) and text.lower() not in WORDS
    return dumper.represent_scalar(TAG + "str", text, style=None if safe else '"')


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(tuple, yaml.SafeDumper.represent_list)


def write_yaml(tree: Any) -> str:
    """YAML that `read_yaml` and `typed` read back the same."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1 << 30)


def written(value: Any) -> str:
    """A value as it can be typed after `key=` and written into a file."""
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return repr(value)
    return json.dumps(value, ensure_ascii=False)
