"""Every ready config loads strictly, and its task can be built where its data are there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cohort.cluster.config import Config
from cohort.cluster.config_file import load_config
from cohort.rewards.base import load_function
from cohort.rewards.config import RewardFunctionConfig
from cohort.rewards.specs import reward_specs
from cohort.rewards.tasks import load_task, sample_rows

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "deploy" / "configs").glob("*.yaml"))
NEEDS_DATA = {"code", "gsm8k", "r1_zero"}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_ready_config_is_valid_and_builds_its_task(path: Path) -> None:
    config = load_config(path, [])
    assert config.run.dir == f"runs/{path.stem}"
    if path.stem in NEEDS_DATA:
        assert config.task.data and config.rewards.functions
        return
    task = load_task(config.task, config.run.seed)
    rows = [row for _, row in sample_rows(task, config.run.seed, 0, 16)]
    assert len({json.dumps(row.content) for row in rows}) > 8
    asked = {json.dumps(task.train_row(i).content) for i in range(min(200, task.train_size()))}
    held = {json.dumps(task.eval_row(i).content) for i in range(min(50, task.eval_size()))}
    assert not asked & held
    for spec in reward_specs(task, config.rewards):
        load_function(spec.path, spec.options)


def test_the_ready_configs_are_all_here() -> None:
    assert {path.stem for path in CONFIGS} >= {
        *("addition", "travel", "countdown", "chain_sum", "letter_counting"),
        *("gsm8k", "r1_zero", "code"),
    }


def config_of(name: str, *overrides: str) -> Config:
    [path] = [path for path in CONFIGS if path.stem == name]
    return load_config(path, list(overrides))


def function_of(config: Config, at: int = 0) -> RewardFunctionConfig:
    assert config.rewards.functions is not None
    item = config.rewards.functions[at]
    return RewardFunctionConfig(path=item) if isinstance(item, str) else item


def test_gsm8k_reads_a_local_file_in_its_own_layout(tmp_path: Path) -> None:
    data = tmp_path / "train.jsonl"
    rows = [{"question": f"{n} and {n}?", "answer": f"It is\n#### {2 * n},000"} for n in range(30)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = config_of("gsm8k", f"task.data={data}", "task.eval_data=null")
    task = load_task(config.task, 0)
    assert (task.train_size(), task.eval_size()) == (27, 3)
    row = task.train_row(0)
    assert row.content[0]["content"].endswith("put the final answer in \\boxed{}.")  # type: ignore[index]
    spec = function_of(config)
    score = load_function(spec.path, spec.options)
    right, wrong = f"so \\boxed{{{row.columns['answer']}}}", "so \\boxed{-1}"
    assert score(
        prompts=[row.content] * 2, completions=[right, wrong], answer=[row.columns["answer"]] * 2
    ) == [1.0, 0.0]


def test_the_real_gsm8k() -> None:
    near = CONFIGS[0].parents[2] / "../shared/data/gsm8k/train.jsonl.gz"
    given = os.environ.get("GSM8K_TRAIN") or str(near)
    if not Path(given).is_file():
        pytest.skip("GSM8K_TRAIN names no train.jsonl.gz")
    config = config_of("gsm8k", f"task.data={given}", "task.eval_data=null")
    task = load_task(config.task, 0)
    assert task.train_size() + task.eval_size() == 7473
    for index in range(task.train_size()):
        float(task.train_row(index).columns["answer"].replace(",", ""))


def test_r1_zero_asks_with_the_published_template_and_batch(tmp_path: Path) -> None:
    data = tmp_path / "maths.jsonl"
    data.write_text('{"prompt": "1 + 1?", "answer": "2"}\n{"prompt": "1 + 2?", "answer": "3"}\n')
    config = config_of("r1_zero", f"task.data={data}")
    text = load_task(config.task, 0).train_row(0).content
    assert isinstance(text, str)
    assert text.startswith("A conversation between User and Assistant. The user asks")
    assert text.endswith("?. Assistant:")
    per_update = config.task.prompts_per_step * config.task.group_size
    assert per_update / config.algorithm.updates_per_step == 512
    assert config.run.steps * config.algorithm.updates_per_step == 10_400
    assert config.algorithm.update_on == "share"
    assert config.algorithm.reference_refresh_steps * config.algorithm.updates_per_step == 400
    assert (config.algorithm.kl_coef, config.learner.learning_rate) == (0.001, 3e-6)
