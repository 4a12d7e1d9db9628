"""Tool calls in what a model wrote."""

from __future__ import annotations

import time

import pytest

from cohort.rewards.environments.calls import OWN

MANY = " " * 100_000


@pytest.mark.parametrize("name", OWN)
def test_a_reply_of_many_spaces_is_read_at_once(name: str) -> None:
    """It is read in the event loop of the worker, which plays other episodes, too."""
    signs = ("<tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "")
    began = time.perf_counter()
    for sign in signs:
        OWN[name](f"{sign}{{{MANY}}}x")
        OWN[name](f"{sign}{MANY}x")
        OWN[name](f"{MANY}{sign}{MANY}x")
        OWN[name](f"{sign} " * 20_000)
    assert time.perf_counter() - began < 2
