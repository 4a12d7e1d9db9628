"""Which weights a token came from, by the order in which tokens and updates arrive."""

from __future__ import annotations

import random

import pytest

from cohort.actors.spans import Spans, ends_of, joined


@pytest.mark.parametrize("seed", range(50))
def test_spans_are_what_a_list_of_single_tokens_says(seed: int) -> None:
    dice = random.Random(seed)
    spans, version = Spans(), 0
    tokens: dict[str, list[int]] = {}
    for number in range(200):
        what = dice.random()
        if what < 0.1:
            spans.begin(f"r{number}")
            tokens[f"r{number}"] = []
        elif what < 0.2:
            version += 1
            spans.update(version)
        elif tokens:
            name = dice.choice(sorted(tokens))
            if what < 0.25:
                made = tokens.pop(name)
                found = spans.end(name, len(made))
                assert [v for v, count in found for _ in range(count)] == made
                assert joined((span,) for span in found) == found
                assert ends_of(found, 7) == ((made[0], made[-1]) if made else (7, 7))
            else:
                count = dice.randint(0, 3)
                spans.made(name, count)
                tokens[name] += [version] * count


def test_tokens_that_were_cut_off_or_came_early() -> None:
    spans = Spans()
    for name, kept, found in (("early", 7, ((0, 3), (1, 4))), ("cut", 4, ((0, 1), (1, 3)))):
        spans.version = 0
        if name == "early":
            spans.made(name, 2)  # before it is known
        spans.begin(name)
        spans.made(name, 1)
        spans.update(1)
        spans.made(name, 4)
        assert spans.end(name, kept) == found
    # The same weights once more are no other weights.
    spans.begin("b")
    spans.made("b", 1)
    spans.update(1)
    spans.made("b", 1)
    assert spans.end("b", 2) == ((1, 2),)
    spans.begin("c")
    spans.forget("c")
    spans.forget("c")
    assert not spans._open
