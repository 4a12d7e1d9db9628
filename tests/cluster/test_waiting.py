"""What a run says about a step that takes long, in virtual time."""

from __future__ import annotations

import asyncio

from cohort.cluster.waiting import SLOW_S, Pending, tell_when_slow
from tests.harness.clock import run


def told(seconds: float, step_s: float, pending: list[Pending]) -> list[str]:
    """What is said in so many seconds about steps that take step_s each."""
    said: list[str] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        task = asyncio.ensure_future(
            tell_when_slow(
                lambda: int((loop.time() - began) // step_s), lambda: pending, said.append
            )
        )
        await asyncio.sleep(seconds)
        task.cancel()

    run(main())
    return said


def test_steps_of_the_usual_length_are_not_talked_about() -> None:
    assert told(10_000, SLOW_S / 2, []) == []


def test_a_slow_step_is_told_with_what_it_waits_for_and_ever_more_rarely() -> None:
    groups = [f"7:{number}" for number in range(8)]
    said = told(1000, 1e9, [Pending("scores of", groups), Pending("completions of", ["7:9"])])
    assert [line.split(";")[0] for line in said] == [
        "step 0: 120 s without an end",
        "step 0: 240 s without an end",
        "step 0: 480 s without an end",
        "step 0: 960 s without an end",
    ]
    assert said[0].endswith("scores of 7:0, 7:1, 7:2, 7:3, 7:4 and 3 more; completions of 7:9")
    assert "the learner, or the engines' new weights" in told(SLOW_S + 1, 1e9, [])[0]
