"""Whole runs of the real stack through the command line, on a tiny model."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.tracking import STEP_KEYS
from learner.checkpoint import latest
from tests.system.conftest import Cohort

pytestmark = [pytest.mark.system, pytest.mark.slow]


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def rollouts(run: Path, step: int) -> list[dict[str, Any]]:
    text = (run / "rollouts" / f"step-{step:06d}.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = latest(run / "checkpoints")
    assert checkpoint is not None
    return load_file(checkpoint / "hf" / "model.safetensors")


def shown(result: subprocess.CompletedProcess[str]) -> str:
    return result.stdout + result.stderr


def test_two_actors_two_ranks_two_reward_workers(
    cohort: Cohort, nothing_left: Callable[[], None]
) -> None:
    """The whole run directory of a run with more than one of everything, overlapped by a step."""
    run = cohort.folder / "wide"
    result = cohort.train(
        run__dir=run,
        run__steps=4,
        actors__count=2,
        actors__max_staleness=1,
        learner__workers=2,
        learner__zero_stage=2,
        rewards__workers=2,
        tracking__table_every=1,
    )
    assert result.returncode == 0, shown(result)
    assert "step 4/4" in result.stdout
    table = rows(run)
    assert [row["step"] for row in table] == [0, 1, 2, 3]
    for row in table:
        assert set(STEP_KEYS) <= set(row)
        assert row["samples/admitted"] == 16 * (row["step"] + 1)
        assert row["samples/admitted"] == (
            row["samples/trained"] + row["samples/filtered"] + row["samples/failed"]
        )
        parts = ("generate", "reward", "train", "sync", "wait")
        assert math.isclose(row["time/step"], sum(row[f"time/{p}"] for p in parts), rel_tol=0.02)
    # The first step's completions are fresh; later ones were started before the last update.
    assert table[0]["async/staleness_max"] == 0
    assert 0 < max(row["async/staleness_max"] for row in table) <= 1
    assert table[0]["mismatch/logprob_abs_max"] < 1e-3
    assert all(row["mismatch/probe_gap"] < 2e-3 for row in table)
    samples = [sample for step in range(4) for sample in rollouts(run, step)]
    assert len({sample["completion_id"] for sample in samples}) == 64
    assert all(len(sample["token_ids"]) == sample["tokens"] for sample in samples)
    assert len({sample["seed"] for sample in samples}) == 64
    logs = {log.name for log in (run / "logs").iterdir()}
    assert logs >= {"rollout-0.log", "rollout-1.log", "learner-0.log", "learner-1.log"}
    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert resolved["actors"]["count"] == 2
    # What W&B holds is what metrics.jsonl holds.
    [offline] = (run / "wandb").glob("offline-run-*")
    leet = Path(sys.executable).parent / "wandb"
    read = subprocess.run(
        [leet, "leet", "inspect", "--summary", "--json", offline],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    summary = json.loads(read.stdout)["summary"]
    assert summary["reward/mean"] == pytest.approx(table[-1]["reward/mean"])
    assert summary["step"] == 3
    nothing_left()


# A task that chooses its rows by what was solved before: a resumed run must choose the same ones.
CURRICULUM: dict[str, object] = {
    "task__name": "mixture",
    "task__options": "{curriculum: true, tasks: [{name: addition, label: large}, "
    "{name: addition, label: small, options: {max_operand: 4}}]}",
    "task__solved_at": 0.2,
}


@pytest.fixture(scope="module")
def straight(cohort: Cohort) -> Path:
    """Four steps in one go."""
    run = cohort.folder / "straight"
    result = cohort.train(run__dir=run, run__steps=4, **CURRICULUM)
    assert result.returncode == 0, shown(result)
    return run


def test_a_resumed_run_equals_one_that_never_stopped(cohort: Cohort, straight: Path) -> None:
    run = cohort.folder / "resumed"
    first = cohort.train(run__dir=run, run__steps=2, **CURRICULUM)
    assert first.returncode == 0, shown(first)
    # A torn, newer checkpoint must not be chosen.
    torn = run / "checkpoints" / "step-3"
    torn.mkdir()
    (torn / "state.json").write_text("{}")
    second = cohort.train(run__dir=run, run__steps=4, run__resume="true", **CURRICULUM)
    assert second.returncode == 0, shown(second)

    assert [row["step"] for row in rows(run)] == [0, 1, 2, 3]
    for step in range(4):
        ours, theirs = rollouts(run, step), rollouts(straight, step)
        assert [s["token_ids"] for s in ours] == [s["token_ids"] for s in theirs], step
        assert [s["prompt_id"] for s in ours] == [s["prompt_id"] for s in theirs]
    for mine, reference in zip(rows(run), rows(straight), strict=True):
        for key in ("reward/mean", "learner/loss", "learner/grad_norm", "samples/trained"):
            assert mine[key] == reference[key], key
    ours, theirs = weights(run), weights(straight)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert len(list((run / "wandb").glob("offline-run-*"))) == 2
    ids = {folder.name.rsplit("-", 1)[1] for folder in (run / "wandb").glob("offline-run-*")}
    assert len(ids) == 1, "a resumed run is the same W&B run"


def test_export_and_eval(cohort: Cohort, straight: Path, tiny_model: Path) -> None:
    out = cohort.folder / "exported"
    result = cohort.run(*cohort_command("export", straight, out))
    assert result.returncode == 0, shown(result)
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.chat_template
    trained = weights(straight)
    before = load_file(tiny_model / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(model.state_dict()[name], trained[name])
    assert not torch.equal(before[name], trained[name])
    again = cohort.run(*cohort_command("export", straight, out))
    assert again.returncode == 1
    assert "error:" in again.stderr

    # vLLM loads the same folder and scores it on prompts that were not trained on.
    report = cohort.folder / "report.json"
    result = cohort.run(
        *cohort_command("eval", straight, "-o", report, "task.eval_prompts=6", "task.solved_at=0.2")
    )
    assert result.returncode == 0, shown(result)
    found = json.loads(report.read_text())
    assert found["prompts"] == 6
    assert 0 <= found["greedy_solved"] <= 1
    assert list(found["pass_at"]) == ["1", "2", "4"]
    assert found["pass_at"]["1"] <= found["pass_at"]["2"] <= found["pass_at"]["4"]


def cohort_command(*arguments: object) -> list[str]:
    return [str(Path(sys.executable).parent / "cohort"), *map(str, arguments)]


def wait_for(path: Path, text: str, process: subprocess.Popen[str], timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while text not in path.read_text():
        assert process.poll() is None, path.read_text()
        assert time.monotonic() < deadline, path.read_text()
        time.sleep(0.1)


def test_killed_engines_are_replaced_and_sigterm_saves(
    cohort: Cohort, nothing_left: Callable[[], None]
) -> None:
    """kill -9, in the middle of training, of the only engine's process, then of its actor; the run
    goes on. Then a polite signal: it saves and leaves."""
    run = cohort.folder / "lost"
    process = cohort.start(run__dir=run, run__steps=500)
    log = cohort.folder / "out.log"
    for step, victim in ((2, "VLLM::EngineCore"), (10, "ray::RolloutActor")):
        wait_for(log, f"step {step:3}/500", process)
        cohort.process(victim).kill()
    wait_for(log, "step  16/500", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143, log.read_text()

    assert log.read_text().count("rollout-0 is replaced") == 2
    table = rows(run)
    assert [row["step"] for row in table] == list(range(len(table)))
    for row in table:
        # Nothing is lost and nothing trained twice.
        assert row["samples/failed"] == 0
        assert row["samples/admitted"] == 16 * (row["step"] + 1)
        assert row["samples/trained"] + row["samples/filtered"] == row["samples/admitted"]
        assert row["mismatch/probe_gap"] < 2e-3
    assert table[-1]["actors/restarts"] == 2
    samples = [sample for row in table for sample in rollouts(run, row["step"])]
    assert len({sample["completion_id"] for sample in samples}) == len(samples)
    checkpoint = latest(run / "checkpoints")
    assert checkpoint is not None
    assert checkpoint.name == f"step-{len(table)}"
    assert "run.resume=true" in log.read_text()
    nothing_left()


def test_sigkill_of_the_driver_leaves_nothing_behind(
    cohort: Cohort, nothing_left: Callable[[], None]
) -> None:
    process = cohort.start(run__dir=cohort.folder / "killed", run__steps=500)
    wait_for(cohort.folder / "out.log", "step   1/500", process)
    process.kill()
    process.wait()
    nothing_left()


def test_a_hanging_reward_stops_the_run_with_one_message(
    cohort: Cohort, nothing_left: Callable[[], None]
) -> None:
    run = cohort.folder / "broken"
    result = cohort.train(
        run__dir=run,
        task__prompts_per_step=2,
        task__group_size=2,
        rewards__functions="[judge.py:hangs]",
        rewards__timeout_s=1,
    )
    assert result.returncode == 1, shown(result)
    assert "timeout" in result.stderr
    assert "rewards.max_error_rate" in result.stderr
    assert "Traceback" not in result.stderr
    assert latest(run / "checkpoints") is None
    nothing_left()
