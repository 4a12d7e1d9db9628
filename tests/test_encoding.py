"""Text files are read and written as UTF-8, whatever the locale says."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("actors", "cluster", "learner", "rewards", "deploy", "benchmarks", "requirements")
# What opens files in text mode without an encoding: the function, and where its mode stands.
READERS = {"read_text": None, "write_text": None, "open": 1, "fdopen": 1, "TextIOWrapper": None}
BINARY_OPENERS = {"os", "gzip", "bz2", "lzma"}


def without_encoding(source: str) -> list[int]:
    """The lines that open a text file in the encoding of the locale."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        if name not in READERS or any(item.arg == "encoding" for item in node.keywords):
            continue
        owner = function.value if isinstance(function, ast.Attribute) else None
        if isinstance(owner, ast.Name) and owner.id in BINARY_OPENERS and name == "open":
            continue
        if READERS[name] is not None:
            method = owner is not None and not (isinstance(owner, ast.Name) and owner.id == "os")
            given = node.args[0 if method else 1 :]
            given += [item.value for item in node.keywords if item.arg == "mode"]
            if given and isinstance(given[0], ast.Constant) and "b" in str(given[0].value):
                continue
        found.append(node.lineno)
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_every_text_file_is_utf_8(package: str) -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{line}"
        for file in sorted((ROOT / package).rglob("*.py"))
        for line in without_encoding(file.read_text(encoding="utf-8"))
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("source", "lines"),
    [
        ("p.read_text()", [1]),
        ("p.read_text(encoding='utf-8')", []),
        ("open(p)", [1]),
        ("open(p, 'rb')", []),
        ("p.open('a')", [1]),
        ("p.open('rb')", []),
        ("os.open(p, os.O_RDONLY)", []),
        ("os.fdopen(n, 'w')", [1]),
        ("gzip.open(p)", []),
    ],
)
def test_what_counts_as_without_encoding(source: str, lines: list[int]) -> None:
    assert without_encoding(source) == lines
