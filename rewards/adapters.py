"""Reward functions of other trainers, unchanged: each becomes a function with our signature.

verl (`kind: verl`):

    compute_score(data_source, solution_str, ground_truth, extra_info=None, **options)
        -> number, or dict with "score"

called once a completion, as verl's reward managers do; it may be `async def`. `ground_truth` is the
column of that name, or `ground_truth` inside the column `reward_model` (verl's own layout).
`data_source` is None and `extra_info` is {} where the rows have no such column.

OpenRLHF (`kind: openrlhf`):

    reward_func(queries, prompts, labels, **options)
        -> numbers, or {"rewards": ..., "scores": ..., "extra_logs": {...}}, as lists or tensors

called once a group. `prompts` are the prompts as the model read them, chat template included;
`queries` are prompts with the completion after them; `labels` is the column `label`, "" without.
"rewards" is the value, "scores" and "extra_logs" are logged.

A column of another name is given by `columns`, for example `columns: {ground_truth: answer}`.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rewards.base import RewardFunction, completion_texts, load_function


def load_reward(path: str, kind: str, options: Mapping[str, Any]) -> RewardFunction:
    """The function that `path` names, as one with our signature.

    kind: `trl` (the same as ours), `verl` or `openrlhf`. Raises RewardLoadError as `load_function`
    does.
    """
    function = load_function(path, options)
    if kind == "verl":
        return from_verl(function)
    if kind == "openrlhf":
        return from_openrlhf(function)
    return function


def from_verl(compute_score: RewardFunction) -> RewardFunction:
    """verl's `compute_score` as a function with our signature."""

    def judged(completions: Sequence[Any], **columns: Any) -> Any:
        texts = completion_texts(completions)
        truths = _ground_truths(columns)
        sources = columns.get("data_source", [None] * len(texts))
        infos = columns.get("extra_info", [None] * len(texts))
        results: list[Any] = []
        for text, truth, source, info in zip(texts, truths, sources, infos, strict=True):
            try:
                results.append(
                    compute_score(
                        data_source=source,
                        solution_str=text,
                        ground_truth=truth,
                        extra_info=dict(info or {}),
                    )
                )
            # A completion that it cannot judge costs no other one.
            except Exception as error:  # noqa: BLE001
                results.append(error)
        if any(inspect.isawaitable(result) for result in results):
            return _gathered(results)
        return results

    return judged


def from_openrlhf(reward_func: RewardFunction) -> RewardFunction:
    """OpenRLHF's `reward_func` as a function with our signature."""

    def judged(
        prompt_texts: Sequence[str],
        completions: Sequence[Any],
        log_metric: Callable[[str, Any], None],
        labels: Sequence[Any] | None = None,
        label: Sequence[Any] | None = None,
    ) -> Any:
        answers = labels if labels is not None else label
        result = reward_func(
            queries=[
                p + c for p, c in zip(prompt_texts, completion_texts(completions), strict=True)
            ],
            prompts=list(prompt_texts),
            labels=[""] * len(prompt_texts) if answers is None else list(answers),
        )
        if not isinstance(result, dict):
            return _listed(result)
        columns = {"score": _listed(result["rewards"])}
        if result.get("scores") is not None:
            columns["scores"] = _listed(result["scores"])
        for name, value in result.get("extra_logs", {}).items():
            logged = _listed(value)
            if isinstance(logged, (list, tuple)):
                columns[name] = logged
            else:
                log_metric(name, logged)
        return columns

    return judged


def _ground_truths(columns: Mapping[str, Any]) -> Sequence[Any]:
    if "ground_truth" in columns:
        return list(columns["ground_truth"])
    models = columns.get("reward_model")
    if models is not None and all("ground_truth" in (model or {}) for model in models):
        return [model["ground_truth"] for model in models]
    raise TypeError(
        "the rows have no column ground_truth, and no reward_model with one inside; name the "
        "column with the right answer as columns: {ground_truth: COLUMN} of this function"
    )


def _listed(value: Any) -> Any:
    """Lists and numbers as they are; tensors as lists or numbers (without importing torch)."""
    return value if isinstance(value, (list, tuple, int, float)) else value.tolist()


async def _gathered(results: Sequence[Any]) -> list[Any]:
    waiting = [result for result in results if inspect.isawaitable(result)]
    done = iter(await asyncio.gather(*waiting, return_exceptions=True))
    return [next(done) if inspect.isawaitable(result) else result for result in results]
