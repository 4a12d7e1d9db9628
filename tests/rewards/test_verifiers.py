"""A real environment of verifiers, which owns its loop: it asks the endpoint for agents.

It needs an older mcp and openai than cpu.lock has, so that it is tried where it was installed.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("verifiers") is None,
        reason="verifiers 0.4.0 needs mcp==2.0.0 and openai<3: it is not installed here",
    ),
]

FILE = Path(__file__).with_name("verifiers_agent.py")


def test_an_environment_of_verifiers(at_table: Any) -> None:
    async def body(table: Any) -> None:
        made = await table.play(["4", "5"])
        assert made.end.failure is None, made.end.failure
        assert made.end.reward == 0.5
        said = [(m["role"], m["content"]) for m in made.end.messages]
        assert said == [
            ("user", "2 + 3?"), ("assistant", "4"), ("user", "No. Again."), ("assistant", "5"),
        ]  # fmt: skip
        assert made.token_ids.tolist() == [*table.ids("4"), *table.ids("5")]

    at_table(f"{FILE}:Verifiers", body, step_timeout_s=120, episode_timeout_s=200)
