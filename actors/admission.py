"""How far generation may run ahead of training, as one integer formula.

Notation: before step s (counted from 0), s steps were done. `skipped` of them changed no weights
(nothing to train on, or a gradient that was not finite), so that the weights which step s trains
have version s - skipped. A completion of step s whose first token comes from version v is
s - skipped - v versions old when it is trained: its staleness. The one formula is

    s - skipped - v <= max_staleness                                                           (1)

It is asked twice. `last_step`: how far the loop admits prompts, with v the version published last.
`oldest_version`: what an engine must have *acknowledged* before it may begin a group, with v its
own version; the pool does not give a group to an engine that is older, nor does the actor begin it.

Bound: no completion is ever trained with a staleness above max_staleness. Proof: let its group be
admitted after n steps, k of them skipped, and begun by an engine of version v. (1) held with
skipped = k. Weights of an engine never get older, so its first token has version v' >= v. When the
group is trained, k' >= k steps were skipped. Its staleness is s - k' - v' <= s - k - v <=
max_staleness.

Progress: an admitted group can always be begun. Proof: after n steps, k skipped, version n - k is
published. `last_step` admits s <= n + max_staleness, so `oldest_version` asks for
s - k - max_staleness <= n - k: an engine that pulls what is published satisfies it.

Nothing is discarded to keep the bound: what would be too old is not begun. A step is trained when
*all* of its groups are there, however long its longest completion took, so that what is trained has
the same distribution of lengths as what is generated.
"""

from __future__ import annotations


def last_step(steps_done: int, max_staleness: int) -> int:
    """The last step whose prompts may be admitted once so many steps are done.

    Example:
        >>> last_step(7, max_staleness=0), last_step(7, max_staleness=2)
        (7, 9)
    """
    # (1) with v = steps_done - skipped, solved for s.
    return steps_done + max_staleness


def oldest_version(step: int, skipped: int, max_staleness: int) -> int:
    """The oldest weights that a group of this step may be begun with.

    Args:
        step: Of the group.
        skipped: Steps that had changed no weights when the group was admitted.
        max_staleness: `actors.max_staleness`.

    Example:
        >>> oldest_version(9, skipped=1, max_staleness=2)
        6
    """
    return max(0, step - skipped - max_staleness)
