"""Reading a config: a YAML file, `key=value` overrides, and messages for what is wrong in them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from cohort.cluster.config import SECTIONS, Config, ConfigError, all_keys
from cohort.cluster.contradictions import contradictions
from cohort.cluster.values import ValueProblem, kind_at, read_value, read_yaml, typed

# What pydantic takes for a bool.
SWITCH = frozenset(["true", "false", "yes", "no", "on", "off", "y", "n", "t", "f", "1", "0"])
# Keys that do not exist, because they would make engine and learner disagree about probabilities.
BIASED_SAMPLING = {
    "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "logit_bias", "typical_p",
}  # fmt: skip


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file, apply overrides, check everything.

    Args:
        path: The file; None for a config of overrides alone.
        overrides: `key=value`, `--key=value` or `--key`, `value`, as on the command line.

    Returns:
        The config with every key present.

    Raises:
        ConfigError: One line for each mistake: unknown keys (with the nearest name), values of the
            wrong type or out of range, contradictions between keys.

    Example:
        >>> load_config("deploy/configs/addition.yaml", ["run.steps=10", "actors.count=2"])
    """
    config = parse_config(path, overrides)
    if problems := list(contradictions(config)):
        raise ConfigError("\n".join(problems))
    return config


def parse_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """As `load_config`, but keys are not checked against each other."""
    tree = {} if path is None else read_tree(Path(path))
    given = parse_overrides(overrides)
    for place, (dotted, value) in enumerate(given.items()):
        _set(tree, dotted, value, list(given)[:place])
    tree.setdefault("model", {})  # so that what is missing is model.path
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(error, tree))) from error


def read_tree(file: Path) -> dict[str, object]:
    """The sections of a config file, each value as its key's type, not yet checked.

    The file is UTF-8, whatever the locale.

    Raises:
        ConfigError: The file cannot be read, or does not hold sections.
    """
    if not file.is_file():
        raise ConfigError(f"no config file at {file}")
    try:
        raw = file.read_bytes()
        tree = typed(read_yaml(raw.decode("utf-8-sig")), Config)
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{file} is not UTF-8 text (line {line}, byte 0x{raw[error.start]:02x}): save it as "
            "UTF-8"
        ) from error
    except ValueProblem as error:
        raise ConfigError(f"{file} is not a config: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{file} must hold sections (run:, model:, ...), not {tree!r}")
    for key in tree:
        if isinstance(key, str) and "." in key:
            section, _, name = key.partition(".")
            raise ConfigError(
                f"{file}: write {key} as a section, `{section}:` and below it `  {name}: ...`; "
                "dotted names are for the command line"
            )
    return tree


def parse_overrides(arguments: Sequence[str]) -> dict[str, object]:
    """Turn `a.b=1`, `--a.b=1` and `--a.b 1` into {"a.b": 1}; values are read by the key's type.

    Raises:
        ConfigError: An argument has no value, or one that cannot be read.
    """
    found: dict[str, object] = {}
    rest = list(arguments)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.removeprefix("--").partition("=")
        key = _full_key(name)
        kind = kind_at(Config, key.split("."))
        if not equals:
            if not argument.startswith("--"):
                raise ConfigError(f"'{argument}' is not key=value")
            following = _value_after(rest, kind)
            if following is None:
                raise ConfigError(f"{key}: no value follows {argument}")
            value = following
        # The last one counts, also against a section given as a whole.
        found.pop(key, None)
        try:
            found[key] = read_value(value, kind, key)
        except ValueProblem as error:
            raise ConfigError(f"{key}: cannot read the value '{value}': {error}") from error
    return found


def _value_after(rest: list[str], kind: object) -> str | None:
    """Remove the value of a flag without "=" from the arguments after it; None if it lacks one."""
    following = rest[0] if rest and not rest[0].startswith("--") else None
    if kind is bool or kind is Any:
        # A bare flag is true: `--resume`, `--run.resume`.
        another = following is not None and re.match(r"[A-Za-z_]+\.[^=]*=", following)
        if following is None or another or (kind is bool and following.lower() not in SWITCH):
            return "true"
    return None if following is None else rest.pop(0)


def _full_key(name: str) -> str:
    """The dotted key that a name on the command line means; names inside dicts stay as they are."""
    section, *inner = {"resume": "run.resume"}.get(name, name).split(".")
    return ".".join([section, *[part.replace("-", "_") for part in inner[:1]], *inner[1:]])


def _set(tree: dict[str, object], dotted: str, value: object, before: list[str]) -> None:
    """Put one override into the tree. before: the overrides that are there already."""
    node = tree
    *parents, leaf = dotted.split(".")
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        below = node[parent]
        if not isinstance(below, dict):
            what = "a list: give all of it" if isinstance(below, list) else "a value, not a section"
            raise ConfigError(f"{dotted}: '{parent}' is {what}")
        node = below
    if dotted in SECTIONS and (value is None or isinstance(value, dict)):
        present = node.get(leaf)
        node[leaf] = {**(present if isinstance(present, dict) else {}), **(value or {})}
        return
    for key in before:
        if key.startswith(f"{dotted}."):
            raise ConfigError(f"{dotted}: replaces {key}, which stands before it; give it first")
    node[leaf] = value


def _explain(error: ValidationError, tree: object) -> Iterator[str]:
    """One line for each mistake that pydantic has found."""
    places = [item["loc"] for item in error.errors()]
    for item in error.errors():
        if item["type"] == "string_type" and _other_branch(item["loc"], places):
            continue
        dotted = ".".join(_location(item["loc"], tree))
        if item["type"] == "extra_forbidden":
            yield f"{dotted}: unknown key{_hint(dotted)}"
        elif item["type"] == "missing":
            yield f"{dotted}: required, and not given"
        elif item["type"] == "model_type":
            yield f"{dotted}: a section of keys, not a value (got {item['input']!r})"
        else:
            yield f"{dotted}: {item['msg']} (got {item['input']!r})"


def _other_branch(place: tuple[int | str, ...], places: list[tuple[int | str, ...]]) -> bool:
    """Whether an error says only that a mapping is no text, in `mapping or text`, where the other
    branch says what is wrong with the mapping."""
    return place[-1] == "str" and any(
        other[: len(place) - 1] == place[:-1] and len(other) > len(place) for other in places
    )


def _location(place: tuple[int | str, ...], node: object) -> Iterator[str]:
    """The path of an error in the file: pydantic's, without the names of union branches."""
    for index, part in enumerate(place):
        if node is None:
            node = {}  # an empty section
        if isinstance(node, dict) and (part in node or index == len(place) - 1):
            yield str(part)
            node = node.get(part)
        elif isinstance(node, list) and isinstance(part, int):
            yield str(part)
            node = node[part] if part < len(node) else None


def _hint(dotted: str) -> str:
    """Why there is no such key, the key that was probably meant, else the keys there are."""
    section, _, leaf = dotted.rpartition(".")
    if leaf in BIASED_SAMPLING:
        return (
            "; refused in training: tokens would come from another distribution than the one "
            "the learner scores, and every ratio would be wrong. Use actors.temperature"
        )
    names = {key.partition(".")[2]: key for key in all_keys()}
    here = SECTIONS[section].model_fields if section in SECTIONS else {}
    near = (
        [key for key in all_keys() if key.endswith(f".{leaf}")]
        or [f"{section}.{name}" for name in difflib.get_close_matches(leaf, here, n=1)]
        or (difflib.get_close_matches(leaf, SECTIONS, n=1) if not section else [])
        or [names[name] for name in difflib.get_close_matches(leaf, names, n=1)]
    )
    if near:
        return f"; did you mean {near[0]}?"
    if here:
        return f"; {section} has {', '.join(here)}"
    return "" if section else f"; the sections are {', '.join(SECTIONS)}"
