"""rollouts/step-NNNNNN.jsonl: every completion of a step with its scores, one a line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TypedDict

from cohort.actors.records import FinishReason, Messages, ScoredGroup
from cohort.cluster.files import replacing
from cohort.cluster.observe.metrics_file import plain


class RolloutError(TypedDict):
    """Why a reward function gave a completion no value."""

    function: str
    cause: str
    message: str


class RolloutRow(TypedDict):
    """One completion: its prompt, its text, its scores.

    `reward` is the weighted total, `by_function` the value of each function, `parts` and `extra`
    what functions returned besides, as in ScoredGroup; `reward_s` the seconds of its scoring.
    `weight_versions` are those of its first and its last token.
    """

    step: int
    group_id: str
    prompt_id: str
    completion_id: str
    prompt: Messages | str
    completion: str
    reward: float | None
    by_function: dict[str, float | None]
    parts: dict[str, float | None]
    extra: dict[str, object]
    reward_s: float | None
    errors: list[RolloutError]
    finish_reason: FinishReason
    weight_versions: list[int]
    seed: int
    prompt_tokens: int
    tokens: int
    token_ids: list[int]


def rollout_rows(step: int, scored: ScoredGroup) -> list[RolloutRow]:
    """The rows of a group, one a completion."""
    group = scored.group
    return [
        {
            "step": step,
            "group_id": group.id,
            "prompt_id": group.prompt.id,
            "completion_id": completion.id,
            "prompt": group.prompt.content,
            "completion": completion.text,
            "reward": plain("reward", scored.totals[i]),
            "by_function": {
                name: plain(name, values[i]) for name, values in scored.by_function.items()
            },
            "parts": {name: plain(name, row[i]) for name, row in scored.parts.items()},
            "extra": {name: row[i] for name, row in scored.extra.items()},
            "reward_s": scored.sample_s[i] if scored.sample_s else None,
            "errors": [
                {"function": e.function, "cause": e.cause, "message": e.message}
                for e in scored.errors
                if e.completion_id == completion.id
            ],
            "finish_reason": completion.finish_reason,
            "weight_versions": [int(v) for v in completion.weight_versions],
            "seed": int(completion.seed),
            "prompt_tokens": len(group.prompt.token_ids),
            "tokens": len(completion.token_ids),
            "token_ids": [int(t) for t in completion.token_ids],
        }
        for i, completion in enumerate(group.completions)
    ]


@contextmanager
def rollout_file(folder: Path, step: int) -> Iterator[Callable[[ScoredGroup], list[RolloutRow]]]:
    """Write folder/step-NNNNNN.jsonl group by group: the function adds one, returns its rows.

    The file is there when the block has ended, whole, or not at all.
    """
    with replacing(folder / f"step-{step:06d}.jsonl") as file:

        def add(scored: ScoredGroup) -> list[RolloutRow]:
            rows = rollout_rows(step, scored)
            for row in rows:
                text = json.dumps(row, ensure_ascii=False) + "\n"
                # Half a surrogate pair, which a dataset may hold, has no UTF-8; as an escape it
                # is JSON.
                file.write(text.encode("utf-8", "backslashreplace"))
            return rows

        yield add


def table_rows(rows: Sequence[RolloutRow], limit: int) -> list[RolloutRow]:
    """At most `limit` of a step's rows: the first completion of every group, then the second ..."""
    seen: dict[str, int] = {}
    ranked = []
    for row in rows:
        rank = seen.get(row["group_id"], 0)
        seen[row["group_id"]] = rank + 1
        ranked.append((rank, row))
    return [row for _, row in islice(sorted(ranked, key=lambda item: item[0]), limit)]
