"""verl's and OpenRLHF's reward functions, as their users wrote them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cohort.actors.records import Completion, Group, Prompt
from cohort.rewards.adapters import from_openrlhf, from_verl, load_reward
from cohort.rewards.base import is_per_completion, score_group
from cohort.rewards.config import RewardFunctionConfig, RewardsConfig
from cohort.rewards.specs import reward_specs
from cohort.rewards.tasks import TaskError
from cohort.rewards.worker import RewardWorker

CHAT = [{"role": "user", "content": "2 + 2?"}]

VERL = """
def compute_score(data_source, solution_str, ground_truth, extra_info=None, bonus=0):
    extra_info["seen"] = True
    if solution_str == "crash":
        raise KeyError("what is that")
    right = solution_str == ground_truth
    if data_source == "plain":
        return float(right) + bonus
    return {"score": float(right) + bonus, "acc": right, "pred": solution_str}

async def compute_score_async(data_source, solution_str, ground_truth, extra_info=None):
    if solution_str == "crash":
        raise KeyError("what is that")
    return float(solution_str == ground_truth)
"""

OPENRLHF = """
import numpy as np

def reward_func(queries, prompts, labels, **kwargs):
    texts = [query[len(prompt):] for query, prompt in zip(queries, prompts) if prompt in query]
    rewards = np.array([float(text == label) for text, label in zip(texts, labels)])
    return {
        "rewards": rewards,
        "scores": rewards / 2,
        "extra_logs": {"accuracy": rewards.mean(), "length": np.array([len(t) for t in texts])},
    }
"""


def make_group(*texts: str, text: str | None = "<user>2 + 2?<assistant>", **columns: Any) -> Group:
    completions = tuple(
        Completion(f"c{i}", "p", np.arange(2), np.zeros(2, np.float32), "stop", i, (0, 0), t)
        for i, t in enumerate(texts)
    )
    return Group("g", Prompt("p", (1,), CHAT, columns, text=text), completions)


@pytest.fixture
def verl(tmp_path: Path) -> Path:
    file = tmp_path / "verl_reward.py"
    file.write_text(VERL)
    return file


def test_verl_numbers_dicts_and_exceptions(verl: Path) -> None:
    function = load_reward(f"{verl}:compute_score", "verl", {"bonus": 1})
    group = make_group("4", "5", "crash", ground_truth="4", data_source="gsm8k")
    result = score_group(function, "f", group)
    assert result.values == (2.0, 1.0, None)
    assert result.parts == {"acc": (1.0, 0.0, None)}
    assert result.extra == {"pred": ("4", "5", None)}
    assert [(e.completion_id, e.cause) for e in result.errors] == [("c2", "raised")]
    assert "what is that" in result.errors[0].message


def test_verl_rows_of_its_own_layout_stay_unchanged(verl: Path) -> None:
    columns = {
        "data_source": "plain",
        "reward_model": {"style": "rule", "ground_truth": "4"},
        "extra_info": {"index": 1},
    }
    group = make_group("4", "5", **columns)
    function = load_reward(f"{verl}:compute_score", "verl", {})
    assert score_group(function, "f", group).values == (1.0, 0.0)
    assert columns["extra_info"] == {"index": 1}


def test_verl_async(verl: Path) -> None:
    function = load_reward(f"{verl}:compute_score_async", "verl", {})
    result = score_group(function, "f", make_group("4", "crash", "5", ground_truth="4"))
    assert result.values == (1.0, None, 0.0)
    assert result.errors[0].cause == "raised"


def test_verl_without_a_right_answer_says_which_key_to_set() -> None:
    result = score_group(from_verl(lambda **_: 1.0), "f", make_group("4", answer="4"))
    assert "columns: {ground_truth: COLUMN}" in result.errors[0].message
    renamed = score_group(
        from_verl(lambda ground_truth, **_: float(ground_truth)),
        "f",
        make_group("4", answer="4"),
        columns={"ground_truth": "answer"},
    )
    assert renamed.values == (4.0,)


def test_openrlhf_gets_the_rendered_prompt_and_its_logs_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "openrlhf_reward.py"
    file.write_text(OPENRLHF)
    function = load_reward(f"{file}:reward_func", "openrlhf", {})
    result = score_group(function, "f", make_group("4", "15", label="4"))
    assert result.errors == ()
    assert result.values == (1.0, 0.0)
    assert result.parts == {"scores": (0.5, 0.0), "length": (1.0, 2.0)}
    assert result.metrics == {"accuracy": (0.5,)}


def test_openrlhf_arguments_as_lists_and_tensors() -> None:
    torch = pytest.importorskip("torch")
    seen: dict[str, Any] = {}

    def reward_func(queries: Any, prompts: Any, labels: Any, **kwargs: Any) -> Any:
        seen.update(queries=queries, prompts=prompts, labels=labels, **kwargs)
        return torch.tensor([0.5, 1.5])

    group = make_group("a", "b", answer=4)
    mapped = score_group(from_openrlhf(reward_func), "f", group, columns={"labels": "answer"})
    assert mapped.values == (0.5, 1.5)
    assert seen == {
        "queries": ["<user>2 + 2?<assistant>a", "<user>2 + 2?<assistant>b"],
        "prompts": ["<user>2 + 2?<assistant>"] * 2,
        "labels": [4, 4],
    }
    score_group(from_openrlhf(reward_func), "f", group)
    assert seen["labels"] == ["", ""]


def test_a_prompt_without_its_text_cannot_be_given_to_openrlhf() -> None:
    result = score_group(from_openrlhf(lambda **_: [1.0]), "f", make_group("a", text=None))
    assert "needs the rendered prompt" in result.errors[0].message


def test_the_config_reaches_the_adapter_in_the_child(verl: Path) -> None:
    config = RewardsConfig(
        functions=[
            RewardFunctionConfig(
                path="verl_reward.py:compute_score",
                kind="verl",
                weight=0.5,
                options={"bonus": 3},
                columns={"ground_truth": "answer"},
            )
        ]
    )
    (spec,) = reward_specs(None, config, verl.parent)  # type: ignore[arg-type]
    actor = RewardWorker([spec], 20)
    meta, scored = actor.score(make_group("4", "5", answer="4"))
    actor.close()
    assert scored is not None
    assert scored.totals == meta.totals == (2.0, 1.5)  # type: ignore[union-attr]
    assert scored.parts == {"compute_score/acc": (1.0, 0.0)}


def test_names_are_metrics_and_options_are_plain(tmp_path: Path) -> None:
    functions = ["a.py:mean", "b.py:mean", "c.py:error_rate"]
    specs = reward_specs(None, RewardsConfig(functions=functions), tmp_path)  # type: ignore[arg-type]
    # reward/mean and reward/error_rate are the step's own metrics.
    assert [spec.name for spec in specs] == ["mean_2", "mean_3", "error_rate_2"]
    odd = RewardFunctionConfig(path="a:f", options={"since": tmp_path})
    with pytest.raises(TaskError, match="options of a:f must be plain values"):
        reward_specs(None, RewardsConfig(functions=[odd]))  # type: ignore[arg-type]


CONVENTIONS = """
import functools

def short(solution_str, ground_truth):
    return float(solution_str == ground_truth)

def open_ended(data_source, solution_str, ground_truth, extra_info=None, **kwargs):
    return {"score": float(solution_str == ground_truth), "names": str(sorted(kwargs))}

def tuple_(solution_str, ground_truth, **kwargs):
    return float(solution_str == ground_truth), "why", {"x": 1}

def listed(data_source, solution_str, ground_truth):
    return [float(solution_str == ground_truth), 7]

def by_other_names(model_output, answer, timeout_score=0):
    return float(model_output == answer)

def only_keywords(**kwargs):
    return float(kwargs["solution_str"] == kwargs["ground_truth"])

async def awaited(data_source, solution_str, ground_truth, extra_info):
    return {"score": float(solution_str == ground_truth and extra_info == {})}

class Judge:
    def __call__(self, data_source, solution_str, ground_truth, extra_info=None):
        return float(solution_str == ground_truth)

instance = Judge()
partial = functools.partial(open_ended, flag=1)
"""


@pytest.mark.parametrize(
    "name",
    [
        "short",
        "open_ended",
        "tuple_",
        "listed",
        "by_other_names",
        "only_keywords",
        "awaited",
        "Judge",
        "instance",
        "partial",
    ],
)
def test_verl_functions_of_every_form_score_each_completion(tmp_path: Path, name: str) -> None:
    file = tmp_path / "conventions.py"
    file.write_text(CONVENTIONS)
    function = load_reward(f"{file}:{name}", "verl", {})
    result = score_group(function, "f", make_group("4", "5", ground_truth="4"))
    assert (result.values, result.errors) == ((1.0, 0.0), ())
    assert is_per_completion(function)
