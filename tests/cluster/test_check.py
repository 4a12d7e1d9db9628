"""The stages of `cohort check` that start no engine."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cohort.actors.records import Completion, Group, GroupMeta, Prompt
from cohort.cluster.commands.check.rewards import Scorers, made_up
from cohort.cluster.commands.check.rollout import Generated, check_completions
from cohort.cluster.commands.check.run import check
from cohort.cluster.commands.check.stages import CheckReport
from cohort.cluster.config import Config
from cohort.cluster.config_file import load_config
from cohort.cluster.prepare import prepare
from cohort.rewards.answer import exact_number
from cohort.rewards.base import score_group
from cohort.rewards.specs import RewardSpec
from cohort.rewards.tasks import PromptRenderer, Row, TaskError
from tests.models import tiny_llama
from tests.templates import FAMILIES, tokenizer_of

REWARDS = """
import time

def right(completions, answer, **_):
    texts = [c[0]["content"] if isinstance(c, list) else c for c in completions]
    return [float(text == str(a)) for text, a in zip(texts, answer)]

def wordy(completions, **_):
    return [float(len(c[0]["content"] if isinstance(c, list) else c)) for c in completions]

def raises(completions, **_):
    raise RuntimeError("the judge is out to lunch")

def needs_text(completions, **_):
    texts = [c[0]["content"] if isinstance(c, list) else c for c in completions]
    return [1.0 / len(text.split()) for text in texts]

def silent(completions, **_):
    return [None for _ in completions]

def slow(completions, answer, **_):
    time.sleep(0.2)
    return right(completions, answer)

def generous(completions, **_):
    return [1.0 for _ in completions]

def longest(completions, **_):
    sizes = [len(str(c)) for c in completions]
    return [float(size == max(sizes)) for size in sizes]
"""


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("check") / "llama")


@pytest.fixture
def judge(tmp_path: Path) -> Path:
    file = tmp_path / "judge.py"
    file.write_text(REWARDS)
    return file


def checked(model: Path, run: Path, /, **sections: dict[str, Any]) -> tuple[int, str]:
    """Exit code and output of a check without engines."""
    tree: dict[str, dict[str, Any]] = {
        "run": {"dir": str(run)},
        "model": {"path": str(model), "dtype": "float32"},
        "actors": {"max_tokens": 12, "kv_cache_gib": 0.25},
    }
    for section, values in sections.items():
        tree[section] = {**tree.get(section, {}), **values}
    lines: list[str] = []
    code = check(Config.model_validate(tree), lines.append, 0)
    return code, "\n".join(lines)


def test_a_good_config(model: Path, tmp_path: Path) -> None:
    code, text = checked(model, tmp_path / "run")
    assert code == 0, text
    assert "This run can start." in text
    # Two prompts as the model reads them, with what the rewards get.
    assert text.count("| <|im_start|>user") == 2
    assert text.count("columns for the rewards: answer=") == 2
    assert "limit: 1,012 = the model's context 1,024 - actors.max_tokens 12" in text
    assert text.count("[ok]") == 7
    [answer] = [line for line in text.splitlines() if line.strip().startswith("answer  ")]
    assert answer.split() == ["answer", "1.00", "1.00"]
    [shown] = [line for line in text.splitlines() if line.strip().startswith("a demonstration  ")]
    assert shown.split()[-2:] == ["1.00", "1.00"]
    assert not (tmp_path / "run").exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"path": "/no/such"}}, "model.path=/no/such: there is no such folder"),
        ({"task": {"name": "adition"}}, "did you mean addition?"),
        ({"actors": {"max_tokens": 2000}}, "leaves no room for a prompt"),
        ({"actors": {"count": 999}}, "actors.count=999"),
        ({"actors": {"kv_cache_gib": 1e-5}}, "actors.kv_cache_gib=1e-05 cannot hold one sequence"),
        ({"rewards": {"functions": ["nothing.py:f"]}}, "nothing.py"),
        ({"cluster": {"address": "127.0.0.1:1"}}, "cluster.address=127.0.0.1:1: cannot connect"),
    ],
)
def test_what_could_not_work(
    model: Path, tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    code, text = checked(model, tmp_path / "run", **sections)
    assert code == 1, text
    last = text.splitlines()[-2:]
    assert last[0].startswith("PROBLEM") and "1 problem." in last[1], text
    assert message in text


def test_a_folder_where_nobody_may_write(model: Path) -> None:
    code, text = checked(model, Path("/proc/cohort/run"))
    assert code == 1
    assert "PROBLEM: run.dir=/proc/cohort/run cannot be written" in text


def test_several_problems_are_told_at_once(model: Path, judge: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("run: {}\n")
    code, text = checked(
        model,
        tmp_path / "run",
        actors={"count": 999},
        rewards={"functions": [f"{judge}:raises"]},
    )
    assert code == 1
    assert "already holds a run: add run.resume=true" in text
    assert "This run could not work: 3 problems." in text
    # As a run would say it, with the end of its traceback.
    assert "RuntimeError: the judge is out to lunch" in text
    assert "raises failed (raised) on 24 of 24 completions" in text


def test_a_reward_that_fails_only_on_nothing_is_a_warning(
    model: Path, judge: Path, tmp_path: Path
) -> None:
    code, text = checked(model, tmp_path / "run", rewards={"functions": [f"{judge}:needs_text"]})
    assert code == 0
    assert "needs_text failed (raised) on 4 of 24 completions" in text
    assert "ZeroDivisionError" in text


def test_a_function_that_compares_is_warned_of_only_where_it_is_said_not_to(
    model: Path, judge: Path, tmp_path: Path
) -> None:
    function: dict[str, Any] = {"path": f"{judge}:longest"}
    code, text = checked(model, tmp_path / "run", rewards={"functions": [function]})
    assert code == 0
    assert "one by one" not in text
    function["whole_group"] = False
    code, text = checked(model, tmp_path / "run", rewards={"functions": [function]})
    assert code == 0
    assert "longest gives completions other values one by one than together" in text
    assert "whole_group: true" in text


def test_rewards_that_can_be_had_for_nothing(model: Path, judge: Path, tmp_path: Path) -> None:
    code, text = checked(model, tmp_path / "run", rewards={"functions": [f"{judge}:generous"]})
    assert code == 0
    assert "a completion that is nothing counts as solved" in text
    assert "the row's own answer, in each of the forms above, earns no more than" in text
    code, text = checked(model, tmp_path / "run", rewards={"functions": [f"{judge}:silent"]})
    assert code == 0
    assert "no function gave a value" in text


def test_weights_that_are_not_whole(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    file = broken / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    code, text = checked(broken, tmp_path / "run")
    assert code == 1 and "is not a whole safetensors file" in text
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n")
    code, text = checked(broken, tmp_path / "run")
    assert code == 1 and "is not a whole safetensors file" in text
    file.unlink()
    code, text = checked(broken, tmp_path / "run")
    assert code == 1 and "there is no model.safetensors" in text
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    (broken / "model-1.safetensors").write_bytes(whole)
    code, text = checked(broken, tmp_path / "run")
    assert code == 1 and "model-2.safetensors missing" in text
    # What config.json describes is larger than what is stored.
    (broken / "model.safetensors.index.json").unlink()
    file.write_bytes(whole)
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    code, text = checked(broken, tmp_path / "run")
    assert code == 1 and "numbers, config.json describes" in text


def test_a_model_with_fewer_tokens_than_its_tokenizer(tmp_path: Path) -> None:
    other = tiny_llama(tmp_path / "other")
    file = other / "tokenizer.json"
    tokens = json.loads(file.read_text())
    for token in ("<tool>", "</tool>"):
        added = {**tokens["added_tokens"][-1], "id": 9000 + len(token), "content": token}
        tokens["added_tokens"].append(added)
    file.write_text(json.dumps(tokens))
    code, text = checked(other, tmp_path / "run")
    assert code == 1 and "they do not belong together" in text


def test_long_prompts(model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} " * (2000 if i == 3 else 5), "answer": i} for i in range(20)]
    held_out = [{"prompt": "old", "answer": 5}, {"prompt": "new", "answer": 1}]
    for name, part in (("train", rows), ("eval", held_out)):
        text = "".join(json.dumps(row) + "\n" for row in part)
        (tmp_path / f"{name}.jsonl").write_text(text)
    task = {
        "name": "dataset",
        "data": str(tmp_path / "train.jsonl"),
        "eval_data": str(tmp_path / "eval.jsonl"),
    }
    rewards = {"functions": ["cohort.rewards.answer:exact_number"]}
    code, text = checked(model, tmp_path / "run", task=task, rewards=rewards)
    assert code == 1 and "1 of 22 prompts are longer than 1012 tokens" in text
    task["overlong"] = "drop"
    code, text = checked(model, tmp_path / "run", task=task, rewards=rewards)
    assert code == 0, text
    assert "1 of 22 prompts are too long and left out" in text


def test_leaks(model: Path, tmp_path: Path) -> None:
    (tmp_path / "leaky.py").write_text(
        "from cohort.rewards.tasks import AdditionTask\n"
        "class Leaky(AdditionTask):\n"
        "    def eval_row(self, index):\n"
        "        return self.train_row(3) if index == 0 else super().eval_row(index)\n"
    )
    task = {"name": f"{tmp_path / 'leaky.py'}:Leaky"}
    code, text = checked(model, tmp_path / "run", task=task)
    assert code == 0, text
    assert "1 of 17 held-out prompts are also trained on" in text


def test_a_run_that_is_continued(model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    checkpoint = run / "checkpoints" / "step-7"
    shutil.copytree(model, checkpoint / "hf")
    (run / "config.yaml").write_text("run: {}\n")
    facts = {"learner.workers": 1, "learner.zero_stage": 1, "model.dtype": "float32"}
    (checkpoint / "learner.json").write_text(json.dumps(facts))
    (checkpoint / "state.json").write_text(json.dumps({"step": 7, "cursor": 56}))
    before = sorted(tmp_path.rglob("*"))
    code, text = checked(model, run, run={"dir": str(run), "resume": True})
    assert code == 0 and "has no complete checkpoint: starts at step 0" in text

    files = [path for path in checkpoint.rglob("*") if path.is_file()]
    sizes = {path.relative_to(checkpoint).as_posix(): path.stat().st_size for path in files}
    (checkpoint / "manifest.json").write_text(json.dumps(sizes))
    (checkpoint / "COMPLETE").write_text("")
    code, text = checked(model, run, run={"dir": str(run), "resume": True})
    assert code == 0 and "goes on after step 7 of 100" in text
    code, text = checked(model, run, run={"dir": str(run), "resume": True, "steps": 7})
    assert code == 0 and "nothing is left to do: raise run.steps above 7" in text
    code, text = checked(
        model, run, run={"dir": str(run), "resume": True}, learner={"zero_stage": 2}
    )
    assert code == 1 and "was written with learner.zero_stage=1" in text
    assert {*before, checkpoint / "manifest.json", checkpoint / "COMPLETE"} == {
        *tmp_path.rglob("*")
    }


# What is said of generated completions ------------------------------------------------------------


def said(
    texts: Sequence[Sequence[str]],
    function: str,
    seconds: float = 1.0,
    cut: bool = False,
    **task: Any,
) -> tuple[int, str]:
    """The stage on these completions of prompts whose answer is 7; exit code and output."""
    size = len(texts[0])
    config = Config.model_validate({"model": {"path": "m"}, "task": {"group_size": size, **task}})
    groups, metas = [], []
    for number, group_texts in enumerate(texts):
        prompt = Prompt(f"p{number}", (1, 2), "3 + 4?", {"answer": 7})
        completions = tuple(
            Completion(
                f"{number}/{place}", prompt.id, np.arange(3), np.zeros(3, np.float32),
                "length" if cut else "stop", 0, (0, 0), text,
            )
            for place, text in enumerate(group_texts)
        )  # fmt: skip
        groups.append(Group(f"0:{number}", prompt, completions))
        metas.append(
            GroupMeta(
                f"0:{number}", 2, tuple(c.id for c in completions), (3,) * size, (cut,) * size,
                (0, 0), "rollout-0", seconds,
            )
        )  # fmt: skip
    lines: list[str] = []
    report = CheckReport(lines.append)
    scorers = Scorers(config, [RewardSpec(function.rpartition(":")[2], function)])
    try:
        with report.stage("generated completions") as stage:
            check_completions(config, Generated(metas, groups, seconds, 1.0), scorers, stage)
    finally:
        scorers.close()
    return report.conclude(), "\n".join(lines)


def test_completions_that_can_teach(judge: Path) -> None:
    code, text = said([["7", "8", "7", "9"]] * 6 + [["1", "2", "3", "4"]] * 2, f"{judge}:right")
    assert code == 0 and "This run can start." in text
    assert "groups without signal (all rewards equal): 2 of 8" in text
    assert "total reward: mean 0.38; solved (at least task.solved_at=1): 38%" in text
    assert "right  mean 0.38, 0.00 to 1.00" in text
    assert "0% truncated" in text
    # The groups with the largest differences are shown, best first.
    shown = [line for line in text.splitlines() if line.strip().startswith("reward ")]
    assert [line.split()[1] for line in shown] == ["1.00", "1.00", "0.00", "0.00"] * 2


def test_rewards_of_many_values_are_counted_as_a_run_does(judge: Path) -> None:
    code, text = said([["a", "bb", "ccc"], ["dd", "ee", "ff"]], f"{judge}:wordy")
    assert code == 0
    assert "groups without signal (all rewards equal): 1 of 2" in text
    assert "Beta-binomial" not in text


@pytest.mark.parametrize(
    ("texts", "function", "options", "message"),
    [
        ([["1", "2"]] * 4, "right", {}, "every completion earned 0: a run learns"),
        ([["7", "7"]] * 4, "right", {}, "there is nothing left to learn here"),
        ([["7", "2"]] * 4, "right", {"cut": True}, "100% of the completions are truncated"),
        ([["1", "2"]] * 3 + [["7", "2"]], "right", {}, "75% of the groups carry no signal"),
        (
            [["7", "2"]] * 4,
            "slow",
            {"seconds": 0.2, "prompts_per_step": 4},
            "would keep up, where there are cores",
        ),
    ],
)
def test_advice(
    judge: Path,
    texts: list[list[str]],
    function: str,
    options: dict[str, Any],
    message: str,
) -> None:
    code, text = said(texts, f"{judge}:{function}", **options)
    assert code == 0
    assert message in text
    assert "This run can start, with 1 warning." in text, text


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("raises", "A run stops above rewards.max_error_rate=0.1"),
        ("silent", "no completion has a reward"),
    ],
)
def test_completions_without_rewards_could_not_work(
    judge: Path, function: str, message: str
) -> None:
    code, text = said([["7", "2"]] * 4, f"{judge}:{function}")
    assert code == 1 and message in text


def test_made_up_answers_come_after_thinking_that_the_prompt_opens() -> None:
    tokenizer = tokenizer_of(next(family for family in FAMILIES if family.name == "qwen3"))
    question = {"role": "user", "content": "2 + 3?"}
    texts = {}
    for name, begun in (("open", "<think>"), ("none", "So "), ("closed", "<think>\n\n</think>\n")):
        row = Row("r", [question, {"role": "assistant", "content": begun}], {"answer": 5})
        group = made_up(PromptRenderer(tokenizer).render(row, 0), None, tokenizer)
        texts[name] = {completion.id: completion.text for completion in group.completions}
        assert score_group(exact_number, "f", group).values[0] == 1.0
    assert texts["none"]["answer"] == texts["closed"]["answer"] == "5"
    assert texts["open"]["answer in <answer>"] == "So</think>\n<answer>5</answer>"
    assert texts["open"]["nothing"] == ""


def test_an_environment_that_gives_no_reward_needs_functions(
    tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "env.py").write_text(
        "class Notes:\n    def note(self, text: str) -> str:\n"
        '        """Keep a note.\n\n        Args:\n            text: It.\n        """\n'
        "        return text\n"
    )
    keys = [f"model.path={tiny_model}", f"task.environment={tmp_path / 'env.py'}:Notes"]
    keys += ["actors.max_tokens=8", "model.dtype=float32"]
    with pytest.raises(TaskError, match=r"nothing gives a reward.*rewards\.functions.*get_reward"):
        prepare(load_config(None, [*keys, "rewards.functions=[]"]))
