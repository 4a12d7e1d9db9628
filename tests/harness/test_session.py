"""A loop of a user's own, through `cohort.launch`."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from cohort.cluster.session import Session
from tests.harness.world import World

MakeWorld = Callable[..., World]


def test_prompts_of_a_step_are_the_same_whenever_they_are_asked_for(world: MakeWorld) -> None:
    async def body(session: Session) -> None:
        later, first = session.prompts(2), session.prompts(0)
        assert [p.id for p in later] == [p.id for p in session.prompts(2)]
        assert not {p.id for p in later} & {p.id for p in first}
        with pytest.raises(ValueError, match="0 or more"):
            session.prompts(-1)

    world().session(body)


def test_groups_of_which_none_is_left_have_no_reward(world: MakeWorld) -> None:
    """A loop that filters its groups may be left without any, and a reward may apply to none."""

    async def body(session: Session) -> None:
        await session.publish()
        scored = await session.score([])
        assert scored == [] and scored.failures == [] and math.isnan(scored.mean_reward)
        groups = await session.generate(session.prompts(0))
        for group in await session.score(groups):
            assert len(group.scores.totals) == session.config.task.group_size

    world().session(body)
