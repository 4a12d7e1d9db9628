"""The bound on staleness, as arithmetic and on simulated runs of everything that may happen."""

from __future__ import annotations

import random

import pytest

from cohort.actors.admission import last_step, oldest_version


def test_both_uses_of_the_formula_agree() -> None:
    """A step may be admitted exactly when the version published last may begin its groups."""
    for done in range(8):
        for skipped in range(done + 1):
            for staleness in range(4):
                last = last_step(done, staleness)
                published = done - skipped
                assert published >= oldest_version(last, skipped, staleness)
                if published:
                    assert published < oldest_version(last + 1, skipped, staleness)


@pytest.mark.parametrize("seed", range(200))
def test_no_completion_is_trained_with_more_staleness_than_allowed_and_nothing_stands_still(
    seed: int,
) -> None:
    """Engines that update late or die, steps that change no weights, groups that are lost."""
    dice = random.Random(seed)
    staleness, steps, groups = dice.randrange(4), 30, dice.randint(1, 4)
    published = done = skipped = admitted = 0
    engines = [0] * dice.randint(1, 4)
    # (step, group) -> the oldest version that it asks for, until it has begun with some version.
    waiting: dict[tuple[int, int], int] = {}
    begun: dict[tuple[int, int], int] = {}
    stale: set[int] = set()
    while done < steps:
        while admitted <= min(last_step(done, staleness), steps - 1):
            oldest = oldest_version(admitted, skipped, staleness)
            waiting |= {(admitted, group): oldest for group in range(groups)}
            admitted += 1
        what = dice.choice(["update", "begin", "begin", "lose", "die", "train"])
        place = dice.randrange(len(engines))
        if what == "update":
            engines[place] = dice.randint(engines[place], published)
        elif what == "die":
            # Its replacement pulls what is published.
            engines[place] = published
        elif what == "begin":
            eligible = [key for key, oldest in waiting.items() if engines[place] >= oldest]
            if eligible:
                key = dice.choice(eligible)
                begun[key] = engines[place]
                del waiting[key]
        elif what == "lose" and begun:
            key = dice.choice(sorted(begun))
            del begun[key]
            waiting[key] = oldest_version(key[0], skipped, staleness)
        elif what == "train" and all((done, group) in begun for group in range(groups)):
            for group in range(groups):
                stale.add(done - skipped - begun.pop((done, group)))
            done += 1
            if dice.random() < 0.2:
                skipped += 1
            else:
                published += 1
            assert published == done - skipped
        # An engine that pulls what is published can always begin what waits.
        assert all(oldest <= published for oldest in waiting.values())
    assert max(stale) <= staleness
