"""rollouts/step-NNNNNN.jsonl: every completion of a step with its scores, one a line."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TypedDict

from cohort.actors.records import Completion, FinishReason, Messages, ScoredGroup
from cohort.cluster.files import replacing
from cohort.cluster.observe.metrics_file import plain


class RolloutError(TypedDict):
    """Why a reward function gave a completion no value."""

    function: str
    cause: str
    message: str


class TurnRow(TypedDict):
    """One turn of an episode, see `TurnShape` and `Turn` in `cohort.actors.records`."""

    parent: int | None
    kept: int
    inserted_ids: list[int]
    tokens: int
    weight_versions: list[int]
    finish_reason: FinishReason
    reward: float | None


class EpisodeRow(TypedDict):
    """How an episode went. messages: all behind the prompt."""

    stop_reason: str
    failure: str | None
    metrics: dict[str, float | None]
    messages: list[dict[str, Any]]
    turns: list[TurnRow]


class RolloutRow(TypedDict):
    """One completion: its prompt, its text, its scores.

    `reward` is the weighted total, `by_function` the value of each function, `parts` and `extra`
    what functions returned besides, as in ScoredGroup; `reward_s` the seconds of its scoring.
    `weight_versions` are those of its first and its last token. Of an episode `completion` is the
    last reply, and `token_ids` are the sampled tokens of all turns; `episode` is None where there
    was no environment.
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
    episode: EpisodeRow | None


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
            "episode": _episode(completion),
        }
        for i, completion in enumerate(group.completions)
    ]


def _episode(completion: Completion) -> EpisodeRow | None:
    end = completion.end
    if end is None:
        return None
    return {
        "stop_reason": end.stop_reason,
        "failure": None if end.failure is None else f"{end.failure.stage}: {end.failure.message}",
        "metrics": {name: plain(name, value) for name, value in end.metrics.items()},
        "messages": list(end.messages),
        "turns": [
            {
                "parent": turn.shape.parent,
                "kept": turn.shape.kept,
                "inserted_ids": turn.inserted_ids.tolist(),
                "tokens": turn.shape.sampled,
                "weight_versions": [int(v) for v in turn.weight_versions],
                "finish_reason": turn.finish_reason,
                "reward": plain("reward", turn.reward),
            }
            for turn in completion.turns
        ],
    }


def transcript(row: Mapping[str, Any]) -> str:
    """What a person reads of a row: the completion, or all messages of an episode with the reward
    of each turn, and why it ended."""
    episode = row.get("episode")
    if not episode:
        return str(row["completion"])
    rewards = iter(turn["reward"] for turn in episode["turns"])
    lines = []
    for message in episode["messages"]:
        role, content = message["role"], str(message["content"])
        for call in message.get("tool_calls", ()):
            function = call["function"]
            arguments = json.dumps(function["arguments"], ensure_ascii=False)
            content += f"\n-> {function['name']}({arguments})"
        earned = next(rewards, None) if role == "assistant" else None
        lines.append(f"[{role}] {content}" + ("" if earned is None else f"  (reward {earned:g})"))
    failure = episode["failure"]
    lines.append(f"[end] {episode['stop_reason']}" + (f": {failure}" if failure else ""))
    return "\n".join(lines)


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
