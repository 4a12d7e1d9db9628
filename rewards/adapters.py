"""Reward functions of other trainers, unchanged: each becomes a function with our signature.

verl (`kind: verl`):

    compute_score(data_source, solution_str, ground_truth, extra_info=None, **options)
        -> number, dict with "score", or tuple that begins with the number

called once a completion, as verl's reward managers do; it may be `async def`. It gets the arguments
that it names; where it names no `solution_str` or no `ground_truth`, as some of verl's own scorers
do not, its next arguments without a default are these two, in this order. `ground_truth` is the
column of that name, or `ground_truth` inside the column `reward_model` (verl's own layout).
`data_source` is None and `extra_info` is {} where the rows have no such column. One with
`solution_strs` is verl's for batches, and is called once a group with lists:

    compute_score(data_sources, solution_strs, ground_truths, extra_infos, **options) -> list

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
from pathlib import Path
from typing import Any

from cohort.rewards.base import completion_texts, per_completion
from cohort.rewards.loading import BY_NAME, RewardFunction, load_function
from cohort.rewards.results import SupportsToList

# What verl's reward managers give a function, by name.
VERL = ("data_source", "solution_str", "ground_truth", "extra_info")


def load_reward(
    path: str, kind: str, options: Mapping[str, object], stubs: Path | None = None
) -> RewardFunction:
    """The function that `path` names, as one with our signature.

    Args:
        path: As for `load_function`.
        kind: `trl` (the same as ours), `verl` or `openrlhf`.
        options: Keyword arguments of the function.
        stubs: As for `load_function`.

    Raises:
        RewardLoadError: As from `load_function`.
    """
    function = load_function(path, options, stubs)
    if kind == "verl":
        return from_verl(function)
    if kind == "openrlhf":
        return from_openrlhf(function)
    return function


def from_verl(compute_score: RewardFunction) -> RewardFunction:
    """verl's `compute_score`, or its form for batches, as a function with our signature."""
    if "solution_strs" in inspect.signature(compute_score).parameters:
        return _from_verl_batches(compute_score)
    names = _verl_names(compute_score)

    @per_completion
    def scored(completions: Sequence[object], **columns: Any) -> object:
        texts = completion_texts(completions)
        truths = _ground_truths(columns) if "ground_truth" in names else [None] * len(texts)
        sources = columns.get("data_source", [None] * len(texts))
        infos = columns.get("extra_info", [None] * len(texts))
        results: list[object] = []
        for text, truth, source, info in zip(texts, truths, sources, infos, strict=True):
            known = {"data_source": source, "solution_str": text, "ground_truth": truth}
            try:
                known["extra_info"] = dict(info or {})
                results.append(compute_score(**{names[key]: known[key] for key in names}))
            # An error of one completion must not cost another its score.
            except Exception as error:  # noqa: BLE001
                results.append(error)
        if any(inspect.isawaitable(result) for result in results):
            return _gathered(results)
        return [_first(result) for result in results]

    return scored


def _verl_names(compute_score: RewardFunction) -> dict[str, str]:
    """verl's arguments that the function has -> its names for them."""
    parameters = inspect.signature(compute_score).parameters.values()
    if any(item.kind is item.VAR_KEYWORD for item in parameters):
        names = {key: key for key in VERL}
    else:
        names = {item.name: item.name for item in parameters if item.name in VERL}
    free = [
        item.name
        for item in parameters
        if item.kind in BY_NAME and item.default is item.empty and item.name not in VERL
    ]
    named = {item.name for item in parameters}
    for key in ("solution_str", "ground_truth"):
        if key not in named and free:
            names[key] = free.pop(0)
    return names


def _from_verl_batches(compute_score: RewardFunction) -> RewardFunction:
    def scored(completions: Sequence[object], **columns: Any) -> object:
        texts = completion_texts(completions)
        return compute_score(
            data_sources=columns.get("data_source", [None] * len(texts)),
            solution_strs=texts,
            ground_truths=_ground_truths(columns),
            extra_infos=[dict(i or {}) for i in columns.get("extra_info", [None] * len(texts))],
        )

    return scored


def _first(result: object) -> object:
    """The score of a result: verl takes the first entry of a list or tuple."""
    return result[0] if isinstance(result, (list, tuple)) and result else result


def from_openrlhf(reward_func: RewardFunction) -> RewardFunction:
    """OpenRLHF's `reward_func` as a function with our signature."""

    def scored(
        prompt_texts: Sequence[str],
        completions: Sequence[object],
        log_metric: Callable[[str, object], None],
        labels: Sequence[object] | None = None,
        label: Sequence[object] | None = None,
    ) -> object:
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

    return scored


def _ground_truths(columns: Mapping[str, Any]) -> Sequence[object]:
    if "ground_truth" in columns:
        return list(columns["ground_truth"])
    models = columns.get("reward_model")
    if models is not None and all(
        isinstance(model, Mapping) and "ground_truth" in model for model in models
    ):
        return [model["ground_truth"] for model in models]
    raise TypeError(
        "the rows have no column ground_truth, and no reward_model with one inside; name the "
        "column with the right answer as columns: {ground_truth: COLUMN} of this function"
    )


def _listed(value: object) -> object:
    """Arrays and tensors as lists or numbers (without importing torch), anything else as it is."""
    return value.tolist() if isinstance(value, SupportsToList) else value


async def _gathered(results: Sequence[object]) -> list[object]:
    waiting = [result for result in results if inspect.isawaitable(result)]
    done = iter(await asyncio.gather(*waiting, return_exceptions=True))
    return [_first(next(done) if inspect.isawaitable(r) else r) for r in results]
