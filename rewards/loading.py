"""Loading what `module:name` or `path/to/file.py:name` names, as a reward function above all.

A file is imported under a name by which other processes find it as well: a process pool that a
reward function starts with `spawn` or `forkserver` imports the file again. That name is

    its dotted name          for a file of a package (folders with `__init__.py`)
    its own name             for any other file
    cohort_NAME_DIGEST       where that name means something else here already, and for a file with
                             relative imports outside a package: a small module of that name in a
                             folder for it runs the real file

The file's folder comes last in `sys.path`, so that its neighbours can be imported and shadow
nothing.

This module is what a reward child process imports: it must stay light.
"""

from __future__ import annotations

import ast
import atexit
import difflib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from cohort.actors.errors import CohortError
from cohort.rewards.results import error_tail

RewardFunction = Callable[..., object]

# Names the signature itself uses; a dataset column may not have them.
RESERVED_COLUMNS = (
    "prompts",
    "completions",
    "completion_ids",
    "log_extra",
    "log_metric",
    "prompt_texts",
    "prefills",
)
BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
NAMED = (inspect.Parameter.POSITIONAL_ONLY, *BY_NAME)


class RewardLoadError(CohortError, ValueError):
    """A path cannot be loaded; the message names the path and what is missing."""


# The short names of built-in rewards, as `rewards.functions` takes them.
BUILT_IN = {
    "boxed_answer": "cohort.rewards.answer:boxed_answer",
    "code": "cohort.rewards.code:CodeTests",
    "exact_number": "cohort.rewards.answer:exact_number",
    "format": "cohort.rewards.format:tagged_think_answer",
    "itinerary": "cohort.rewards.travel.reward:itinerary",
    "judge": "cohort.rewards.judge:LLMJudge",
    "language": "cohort.rewards.language:language_consistency",
    "maths": "cohort.rewards.maths:MathAnswer",
    "number_only": "cohort.rewards.format:number_only",
    "reasoning_gym": "cohort.rewards.reasoning_gym:score",
    "repetition": "cohort.rewards.length:repetition",
    "reward_model": "cohort.rewards.reward_model:RewardModel",
    "soft_overlong": "cohort.rewards.length:soft_overlong",
    "tagged_answer": "cohort.rewards.answer:tagged_answer",
}


def reward_path(name: str) -> str:
    """The path of a built-in reward by its short name; a path is returned as it is.

    Raises:
        RewardLoadError: A word that is neither.

    Example:
        >>> reward_path("maths")
        'cohort.rewards.maths:MathAnswer'
    """
    if name in BUILT_IN or not name.isidentifier():
        return BUILT_IN.get(name, name)
    near = difflib.get_close_matches(name, BUILT_IN, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(BUILT_IN)}."
    raise RewardLoadError(
        f"'{name}' is not a built-in reward: {hint} Your own is module:name or path/to/file.py:name"
    )


def resolve_path(path: str, base: Path) -> str:
    """Make the file of `path.py:name` absolute, from `base`; leave `module:name` as it is."""
    location, colon, name = path.rpartition(":")
    if not colon or not _is_file(location):
        return path
    file = Path(os.path.expandvars(location)).expanduser()
    return f"{(base / file).resolve()}:{name}"


def load_attribute(path: str, stubs: Path | None = None) -> Any:
    """What `module:name` or `path/to/file.py:name` names; `name` may be dotted.

    Args:
        path: See above.
        stubs: The folder for modules that run a file under another name; by default one that ends
            with this process.

    Raises:
        RewardLoadError: Another form, no such file or module, an import that fails, no such name
            (the message has the nearest one).
    """
    location, colon, name = path.rpartition(":")
    if not colon or not location or not name:
        hint = ""
        if not colon and "." in path and not path.endswith(".py"):
            hint = f"; did you mean {':'.join(path.rsplit('.', 1))}?"
        raise RewardLoadError(f"'{path}' must be module:name or path/to/file.py:name{hint}")
    if _is_file(location):
        found: Any = _load_file(path, location, stubs)
    else:
        found = _imported(path, location, location)
    for part in name.split("."):
        found = _attribute(path, location, found, part)
    return found


def _attribute(path: str, location: str, owner: object, name: str) -> object:
    # Not vars(): a module may make its names when they are asked for (PEP 562).
    try:
        return getattr(owner, name)
    except AttributeError as error:
        known = [key for key in dir(owner) if key[0] != "_"]
        near = difflib.get_close_matches(name, known, n=1)
        public = [key for key in known if callable(inspect.getattr_static(owner, key, None))]
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(public) or 'none'}"
        raise RewardLoadError(f"'{path}': no '{name}' in {location}; {hint}") from error
    # Code of users may raise anything: what makes the name may import anything.
    except Exception as error:
        raise RewardLoadError(_import_failed(path, location, error)) from error


def load_function(
    path: str, options: Mapping[str, object] | None = None, stubs: Path | None = None
) -> RewardFunction:
    """The reward function that a short name, `module:function` or `path/to/file.py:function` names.

    A function that takes nothing of a group and returns a function makes reward functions: it is
    called once with its options.

    Args:
        path: See above.
        options: Keyword arguments that it gets at every call, or its class's constructor once.
        stubs: As for `load_attribute`.

    Raises:
        RewardLoadError: As from `load_attribute`; also for something that is not a function, an
            option that it does not have, and a class that cannot be constructed.
    """
    found = load_attribute(reward_path(path), stubs)
    given = dict(options or {})
    is_class = inspect.isclass(found)
    if not callable(found) or (is_class and not any("__call__" in vars(c) for c in found.__mro__)):
        what = "a class" if is_class else f"of type {type(found).__name__}"
        hint = " (an object that is called needs __call__)" if is_class else ""
        raise RewardLoadError(f"'{path}' is {what}, not a function{hint}")
    parameters = _checked_parameters(path, found, given)
    if not is_class:
        function = functools.partial(found, **given) if given else found
        return _made(function, parameters, given)
    try:
        return found(**given)
    # Code of users may raise anything.
    except Exception as error:
        raise RewardLoadError(f"'{path}' cannot be constructed:\n{error_tail(error)}") from error


def _checked_parameters(
    path: str, found: Callable[..., object], options: Mapping[str, object]
) -> list[inspect.Parameter]:
    try:
        parameters = list(inspect.signature(found).parameters.values())
    except (ValueError, TypeError) as error:
        raise RewardLoadError(f"'{path}' does not say which arguments it takes: {error}") from error
    known = [item.name for item in parameters if item.kind in BY_NAME]
    known = [name for name in known if name not in RESERVED_COLUMNS]
    open_ended = any(item.kind is item.VAR_KEYWORD for item in parameters)
    for name in options:
        if name in RESERVED_COLUMNS or (name not in known and not open_ended):
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known) or 'none'}"
            raise RewardLoadError(f"'{path}': unknown option '{name}'; {hint}")
    if inspect.isclass(found):
        for item in parameters:
            required = item.default is item.empty and item.kind in BY_NAME
            if required and item.name not in options:
                raise RewardLoadError(f"'{path}': option '{item.name}' is required")
    return parameters


def _made(
    function: RewardFunction, parameters: list[inspect.Parameter], options: Mapping[str, object]
) -> RewardFunction:
    """What `function` makes, if it is a factory of reward functions, else `function`."""
    sees_a_group = any(
        item.name in RESERVED_COLUMNS
        or item.kind is item.VAR_KEYWORD
        or (item.kind in NAMED and item.default is item.empty and item.name not in options)
        for item in parameters
    )
    if sees_a_group:
        return function
    try:
        made = function()
    # Not a factory, or a broken one: then every call fails, and is counted.
    except Exception:  # noqa: BLE001
        return function
    if inspect.iscoroutine(made):
        made.close()
    return made if callable(made) else function


def _is_file(location: str) -> bool:
    return location.endswith(".py") or os.sep in location


def _imported(path: str, location: str, name: str) -> ModuleType:
    """Module `name`; `location` is what the user wrote."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        is_it = error.name is not None and (name == error.name or name.startswith(error.name + "."))
        if is_it and name == location:
            raise RewardLoadError(
                f"'{path}': no module named '{error.name}' for {sys.executable} "
                f"({_built_in_at(path) or 'for a file, write path/to/file.py:name'})"
            ) from error
        raise RewardLoadError(_import_failed(path, location, error)) from error
    # Code of users may raise anything.
    except Exception as error:
        raise RewardLoadError(_import_failed(path, location, error)) from error


def _built_in_at(path: str) -> str:
    """Which built-in reward a path below `rewards` means that lacks our package's name."""
    known = {full.removeprefix("cohort."): short for short, full in BUILT_IN.items()}
    return f"did you mean {known[path]}, or cohort.{path}?" if path in known else ""


def _load_file(path: str, location: str, stubs: Path | None) -> ModuleType:
    file = Path(os.path.expandvars(location)).expanduser().resolve()
    if not file.is_file():
        raise RewardLoadError(f"'{path}': no file {file} on {platform.node()}")
    if file.suffix != ".py":
        raise RewardLoadError(f"'{path}': {file} is not a Python file")
    importlib.invalidate_caches()
    root, parts = _package_of(file)
    imports = _imports(file)
    for folder in (root, file.parent):
        # As for a script, the file's neighbours can be imported; last, so that they shadow nothing.
        if str(folder) not in sys.path:
            sys.path.append(str(folder))
    top = root / parts[0] / "__init__.py" if len(parts) > 1 else file
    relative = max((node.level for node in imports if isinstance(node, ast.ImportFrom)), default=0)
    if len(parts) == 1 and relative:
        # Relative imports outside a package: its folder (or one above it) serves as one.
        base = file.parents[relative - 1]
        below = file.relative_to(base).with_suffix("").parts
        name = ".".join((_stub(base, stubs), *below))
    elif _means(parts[0], top):
        _check_neighbours(path, file, imports)
        name = ".".join(parts)
    else:
        _check_neighbours(path, file, imports)
        name = ".".join((_stub(top, stubs), *parts[1:]))
    return _imported(path, str(file), name)


def _package_of(file: Path) -> tuple[Path, tuple[str, ...]]:
    """The folder above the file's outermost package, and the file's dotted name from there."""
    root = file.parent
    while (root / "__init__.py").is_file():
        root = root.parent
    parts = file.relative_to(root).with_suffix("").parts
    return root, parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts


def _imports(file: Path) -> list[ast.Import | ast.ImportFrom]:
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        # Importing it tells of this with its line.
        return []
    return [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]


def _means(name: str, file: Path) -> bool:
    """Whether `import name` runs this file in this process."""
    return "." not in name and _origin(name) == file


def _origin(name: str) -> Path | None:
    """The file that `import name` runs, for a name without dots."""
    try:
        spec = importlib.util.find_spec(name)
    except (ValueError, ImportError):
        # A module without a spec, `__main__` for one.
        return None
    return None if spec is None or spec.origin is None else Path(spec.origin).resolve()


def _check_neighbours(path: str, file: Path, imports: list[ast.Import | ast.ImportFrom]) -> None:
    """Refuse a file whose neighbour has the name of another module, which it would get instead."""
    names = [alias.name for node in imports if isinstance(node, ast.Import) for alias in node.names]
    names += [
        node.module or "" for node in imports if isinstance(node, ast.ImportFrom) and not node.level
    ]
    for name in dict.fromkeys(item.partition(".")[0] for item in names):
        if not name or name in sys.stdlib_module_names:
            continue
        for neighbour in (file.parent / f"{name}.py", file.parent / name / "__init__.py"):
            found = _origin(name) if neighbour.is_file() else None
            if found is not None and found != neighbour.resolve():
                raise RewardLoadError(
                    f"'{path}' imports {name}, which would be {found} here and not {neighbour}: "
                    "rename that file, or make the folder a package and import it by a dot"
                )


def _stub(real: Path, stubs: Path | None) -> str:
    """The name of a module that any process with this one's sys.path can import, and that is
    `real`: a module's file, a package's __init__.py, or the folder of a package."""
    folder = stubs or _own_stubs()
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    package = real.is_dir() or real.name == "__init__.py"
    home = real if real.is_dir() else real.parent
    stem = re.sub(r"\W", "_", home.name if package else real.stem)
    digest = hashlib.blake2b(str(real).encode(), digest_size=4).hexdigest()
    name = f"cohort_{stem}_{digest}"
    lines = [f"__path__ = [{str(home)!r}]\n"] if package else []
    if real.is_file():
        lines.append(f"__file__ = {str(real)!r}\n")
        lines.append("exec(compile(open(__file__, 'rb').read(), __file__, 'exec'))\n")
    target = folder / name / "__init__.py" if package else folder / f"{name}.py"
    target.parent.mkdir(exist_ok=True)
    target.write_text("".join(lines), encoding="utf-8")
    importlib.invalidate_caches()
    return name


@functools.cache
def _own_stubs() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="cohort-modules-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _import_failed(path: str, location: str, error: BaseException) -> str:
    return f"'{path}': importing {location} failed:\n{error_tail(error)}"
