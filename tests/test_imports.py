"""The order of the packages, from the imports themselves: they only point down, in no circles."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# What each package may import of the others, which is also what it may know of.
BELOW = {
    "actors": set(),
    "rewards": {"actors"},
    "learner": {"actors"},
    "cluster": {"actors", "rewards", "learner"},
}
LONGEST = 400
# Uses of Any in the product: where a type could not be said.
ANYS = 120
# What no command waits for before it has read its config.
HEAVY = {"deepspeed", "ray", "torch", "transformers", "vllm", "wandb"}


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(("cohort", *(part for part in parts if part not in ("cohort", "__init__"))))


# Every module of the product by its name, with its syntax tree.
MODULES = {
    name_of(file): ast.parse(file.read_text(encoding="utf-8"))
    for folder in (*BELOW, "cohort")
    for file in sorted((ROOT / folder).rglob("*.py"))
}


def imported(tree: ast.AST) -> Iterator[str]:
    """Every name that is imported anywhere, in functions and for type checkers too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def package(module: str) -> str:
    """`actors` of `cohort.actors.pool`; empty for `cohort` itself."""
    return module.partition(".")[2].partition(".")[0]


def circle(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


GRAPH = {
    name: {found for found in imported(tree) if found in MODULES and found != name}
    for name, tree in MODULES.items()
}


def test_every_module_is_looked_at() -> None:
    assert {package(name) for name in MODULES} == {"", *BELOW}
    assert len(MODULES) > 100
    assert "cohort.rewards.base" in GRAPH["cohort.rewards.worker"]
    # One below TYPE_CHECKING, one in a function, and the circle of the two.
    text = "if TYPE_CHECKING:\n    import a.b\ndef f():\n    from c import d\n"
    assert list(imported(ast.parse(text))) == ["a.b", "c", "c.d"]
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})
    assert not circle({"a": {"b", "c"}, "b": {"c"}})


@pytest.mark.parametrize("folder", BELOW)
def test_imports_point_down(folder: str) -> None:
    """Nothing below cluster knows cluster; learner and rewards do not know each other."""
    wrong = [
        f"{name} imports {found}"
        for name, others in GRAPH.items()
        for found in others
        if package(name) == folder and package(found) not in {folder, *BELOW[folder]}
    ]
    assert wrong == []


def test_no_circles() -> None:
    assert circle(GRAPH) == []


def test_the_packages_are_imported_below_cohort() -> None:
    """A user's own `rewards` or `cluster` is never taken for ours."""
    wrong = [
        f"{name} imports {found}"
        for name, tree in MODULES.items()
        for found in imported(tree)
        if found.partition(".")[0] in BELOW
    ]
    assert wrong == []


def at_import(body: list[ast.stmt]) -> Iterator[str]:
    """The names whose import is part of a module's own import."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imported(node)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            yield from at_import([*node.body, *node.orelse])
        elif isinstance(node, ast.Try | ast.With | ast.ClassDef):
            yield from at_import(node.body)


def test_the_command_line_starts_without_heavy_libraries() -> None:
    seen, todo = set(), {"cohort.cluster.cli"}
    while todo:
        name = todo.pop()
        seen.add(name)
        todo |= (set(at_import(MODULES[name].body)) & set(MODULES)) - seen
    assert "cohort.learner.config" in seen
    found = {other for name in seen for other in at_import(MODULES[name].body)}
    assert not HEAVY & {other.partition(".")[0] for other in found}


def children(name: str) -> set[str]:
    """The modules of a package, and its packages with a slash behind."""
    below = {module[len(name) + 1 :] for module in MODULES if module.startswith(f"{name}.")}
    inner = {module.partition(".")[0] for module in below if "." in module}
    return {f"{module}/" if module in inner else module for module in below if "." not in module}


@pytest.mark.parametrize("name", [name for name in MODULES if name != "cohort" and children(name)])
def test_a_package_names_its_parts(name: str) -> None:
    """Each part of a package is in a list of its docstring, once, and what is there exists."""
    doc = ast.get_docstring(MODULES[name]) or ""
    heads = re.findall(r"^- ((?:`\w+/?`(?:, )?)+): ", doc, re.M)
    assert sorted(part.strip("`") for head in heads for part in head.split(", ")) == sorted(
        children(name)
    )


def test_the_errors_for_people_are_listed_with_their_base() -> None:
    """The list in the docstring of `CohortError` is the tree of its subclasses."""
    classes = [
        node
        for tree in MODULES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    ]
    base = {"CohortError": ""}
    while found := {
        node.name: parent
        for node in classes
        for parent in (ast.unparse(of).rpartition(".")[2] for of in node.bases)
        if parent in base and node.name not in base
    }:
        base |= found
    assert base["NotFiniteError"] == "CheckpointError"
    [root] = [node for node in classes if node.name == "CohortError"]
    listed: dict[str, str] = {}
    above = [""]
    for indent, names in re.findall(r"^( *)- ([\w, ]+)", ast.get_docstring(root) or "", re.M):
        above[len(indent) // 2 + 1 :] = [names]
        listed |= dict.fromkeys(names.split(", "), above[-2])
    assert listed == base


def test_no_file_is_too_long() -> None:
    too_long = {
        file.relative_to(ROOT).as_posix()
        for folder in BELOW
        for file in (ROOT / folder).rglob("*.*")
        if file.suffix in {".py", ".js", ".css", ".html"}
        and len(file.read_text(encoding="utf-8").splitlines()) > LONGEST
    }
    assert too_long == set()


def test_types_say_what_flows() -> None:
    uses = [
        f"{name}:{node.lineno}"
        for name, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and node.id == "Any"
    ]
    assert len(uses) < ANYS, uses
