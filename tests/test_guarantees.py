"""docs/guarantees.md names tests that exist and are run."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "guarantees.md"
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def promises() -> list[str]:
    """The page's list entries, up to the section of what is not promised."""
    text = PAGE.read_text().split("## What is not promised")[0]
    return [entry.strip() for entry in re.split(r"^- ", text, flags=re.M)[1:]]


def names() -> list[tuple[str, str]]:
    return sorted(set(NAMED.findall(PAGE.read_text())))


def decorators(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    return " ".join(ast.unparse(item) for item in node.decorator_list)


def marks(file: str, name: str) -> list[str]:
    """Of a test and of its file; fails where there is none of this name."""
    tree = ast.parse((ROOT / file).read_text())
    found = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name
    ]
    assert found, f"{file} has no {name}"
    of_file = [ast.unparse(n) for n in tree.body if "pytestmark" in ast.unparse(n).split("=")[0]]
    return [decorators(found[-1]), *of_file]


def always(file: str, name: str) -> bool:
    """Whether `make test` runs it, or some of its cases."""
    return all("exhaustive" not in text or "param" in text for text in marks(file, name))


def test_every_promise_names_a_test_that_is_always_run() -> None:
    assert len(promises()) >= 10
    assert not [
        promise
        for promise in promises()
        if not any(always(file, name) for file, name in NAMED.findall(promise))
    ]


@pytest.mark.parametrize(("file", "name"), names(), ids=lambda value: value)
def test_a_named_test_exists_and_is_run(file: str, name: str) -> None:
    """Neither it nor its file is switched off. What needs a tool of the machine is not named."""
    assert name.startswith("test_")
    for text in marks(file, name):
        assert "skip" not in text
        assert "xfail" not in text
