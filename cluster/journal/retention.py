"""Which segments of a journal may be removed. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def removable(
    sizes: Mapping[int, int],
    last_steps: Mapping[int, int],
    checkpoints: Sequence[int],
    limit_bytes: int,
    keep_all: bool,
) -> list[int]:
    """The segments to remove after a checkpoint was committed, the oldest first.

    A resume from the newest checkpoint needs all records of its step and later ones. What is
    between the older checkpoints that are kept is there for `cohort replay`, and for a newest one
    that turns out to be damaged, as far as `limit_bytes` allows.

    Args:
        sizes: Bytes of each segment, by its number; without the one that is being written.
        last_steps: The last step that each has a record of.
        checkpoints: Steps of the complete checkpoints, in order.
        limit_bytes: Of all segments together.
        keep_all: Remove none.

    Example:
        >>> removable({1: 5, 2: 5, 3: 5}, {1: 9, 2: 19, 3: 29}, [10, 20], 100, False)
        [1]
        >>> removable({1: 5, 2: 5, 3: 5}, {1: 9, 2: 19, 3: 29}, [10, 20], 9, False)
        [1, 2]
    """
    if keep_all or not checkpoints:
        return []
    total, found = sum(sizes.values()), []
    for number in sorted(sizes):
        # In order: a later segment without an earlier one has a gap before it.
        unreachable = last_steps[number] < checkpoints[0]
        too_much = total > limit_bytes and last_steps[number] < checkpoints[-1]
        if not (unreachable or too_much):
            break
        found.append(number)
        total -= sizes[number]
    return found
