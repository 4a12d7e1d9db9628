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


def test_every_promise_names_a_test() -> None:
    assert len(promises()) >= 10
    assert not [promise for promise in promises() if not NAMED.search(promise)]


@pytest.mark.parametrize(("file", "name"), names(), ids=lambda value: value)
def test_a_named_test_exists_and_is_run(file: str, name: str) -> None:
    tree = ast.parse((ROOT / file).read_text())
    found = [
        node
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name
    ]
    assert found, f"{file} has no {name}"
    assert name.startswith("test_")
    # Neither it nor its file is switched off. What needs a tool of the machine is not named here.
    marks = [ast.unparse(n) for n in tree.body if "pytestmark" in ast.unparse(n).split("=")[0]]
    for text in (decorators(found[-1]), *marks):
        assert "skip" not in text
        assert "xfail" not in text
        assert "exhaustive" not in text or "param" in text
