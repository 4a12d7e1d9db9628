"""Whole runs of the real stack through the command line, on a tiny model."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from cohort.learner.checkpoint import latest
from tests.system.conftest import Cohort
from tests.system.runs import rollouts, rows

pytestmark = [pytest.mark.system, pytest.mark.slow]


def weights(run: Path) -> dict[str, torch.Tensor]:
    checkpoint = latest(run / "checkpoints")
    assert checkpoint is not None
    return load_file(checkpoint / "hf" / "model.safetensors")


def shown(result: subprocess.CompletedProcess[str]) -> str:
    return result.stdout + result.stderr


# A task that chooses its rows by what was solved before: a resumed run must choose the same ones.
CURRICULUM: dict[str, object] = {
    "task__name": "mixture",
    "task__options": "{curriculum: true, tasks: [{name: addition, label: large}, "
    "{name: addition, label: small, options: {max_operand: 4}}]}",
    "task__solved_at": 0.2,
    # A module of the user that has a name of ours.
    "rewards__functions": "[theirs.py:digits]",
}
# Settings that transformers warns of when it loads them and refuses to save.
CONTRADICTORY = {"do_sample": False, "temperature": 0.6}


@pytest.fixture(scope="module")
def keys(cohort: Cohort) -> dict[str, object]:
    """Of the run that is compared: a curriculum, a reward of the user, a model that is hard to
    save."""
    model = cohort.folder / "contradictory"
    shutil.copytree(cohort.model, model)
    (model / "generation_config.json").write_text(json.dumps(CONTRADICTORY))
    return CURRICULUM | {"model__path": model}


@pytest.fixture(scope="module")
def straight(cohort: Cohort, keys: dict[str, object]) -> Path:
    """Four steps in one go."""
    run = cohort.folder / "straight"
    result = cohort.train(run__dir=run, run__steps=4, **keys)
    assert result.returncode == 0, shown(result)
    return run


def test_a_run_whose_driver_was_killed_leaves_nothing_and_resumes_exactly(
    cohort: Cohort, keys: dict[str, object], straight: Path, nothing_left: Callable[[], None]
) -> None:
    """kill -9 in a later step than its checkpoint's; it ends as the run that never stopped."""
    run = cohort.folder / "resumed"
    every = {"run__checkpoint_every": 2, "run__keep_checkpoints": 100}
    process = cohort.start(run__dir=run, run__steps=500, **every, **keys)
    wait_for(cohort.folder / "out.log", "step   3/500", process)
    # It is written while training goes on.
    checkpoints = run / "checkpoints"
    deadline = time.monotonic() + 60
    while not (checkpoints / "step-2").is_dir():
        assert time.monotonic() < deadline, (cohort.folder / "out.log").read_text()
        time.sleep(0.1)
    process.kill()
    process.wait()
    nothing_left()
    # What came after the checkpoint is done again, a torn, newer checkpoint not chosen.
    for other in checkpoints.iterdir():
        if other.name != "step-2":
            shutil.rmtree(other)
    assert latest(checkpoints) == checkpoints / "step-2"
    assert len(rows(run)) > 2
    torn = checkpoints / "step-3"
    torn.mkdir()
    (torn / "state.json").write_text("{}")
    second = cohort.train(run__dir=run, run__steps=4, run__resume="true", **keys)
    assert second.returncode == 0, shown(second)

    assert [row["step"] for row in rows(run)] == [0, 1, 2, 3]
    assert len(list((run / "rollouts").iterdir())) == 4
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
    checkpoint = latest(straight / "checkpoints")
    assert checkpoint is not None
    assert json.loads((checkpoint / "hf" / "generation_config.json").read_text()) == CONTRADICTORY
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


def wait_for(path: Path, text: str, process: subprocess.Popen[str], timeout: float = 300) -> None:
    deadline = time.monotonic() + timeout
    while text not in path.read_text():
        assert process.poll() is None, path.read_text()
        assert time.monotonic() < deadline, path.read_text()
        time.sleep(0.1)


MOMENTS = (
    (signal.SIGKILL, "starting 1 engine(s)"),
    (signal.SIGTERM, ""),
    (signal.SIGTERM, "starting Ray"),
    (signal.SIGINT, "starting 1 engine(s)"),
)


@pytest.mark.parametrize(
    "moments", [MOMENTS[:1], pytest.param(MOMENTS[1:], marks=pytest.mark.exhaustive)]
)
def test_a_start_stopped_at_any_moment_is_started_again_and_a_run_without_ray_ends(
    moments: Sequence[tuple[signal.Signals, str]],
    cohort: Cohort,
    nothing_left: Callable[[], None],
    tmp_path: Path,
) -> None:
    """The same command every time: ended before Ray is there, in the middle of the start by each
    signal, by an engine that does not start in time; then it trains. The rollout writer is
    replaced. Without Ray nothing goes on: the run ends, and says so."""
    run = tmp_path / "again"
    log = cohort.folder / "out.log"
    long: dict[str, object] = {"run__dir": run, "run__steps": 500, "run__checkpoint_every": 2}
    for number, text in moments:
        process = cohort.start(**long)
        if text:
            wait_for(log, text, process)
        time.sleep(1)
        process.send_signal(number)
        code = process.wait(60)
        assert code == (-9 if number == signal.SIGKILL else 128 + number), log.read_text()
        assert "Traceback" not in log.read_text(), log.read_text()
        assert "PC: @" not in log.read_text(), log.read_text()
        nothing_left()
    failed = cohort.train(**long, actors__start_timeout_s=0.5)
    assert failed.returncode == 1, shown(failed)
    assert "actors.start_timeout_s" in failed.stderr
    nothing_left()
    process = cohort.start(**long)
    wait_for(log, "step   3/500", process)
    cohort.process("ray::_Writer").kill()
    wait_for(log, "step   8/500", process)
    assert len(list((run / "rollouts").glob("step-*.jsonl"))) >= 7
    [raylet] = [p for p, name in cohort.processes() if "raylet/raylet" in name]
    raylet.kill()
    assert process.wait(90) == 75, log.read_text()
    assert "died, and no run goes on without it" in log.read_text()
    assert "_GatheringFuture" not in log.read_text()
    nothing_left()
    # It is a run now, and is not overwritten.
    again = cohort.train(**long)
    assert again.returncode == 1
    assert "run.resume=true" in again.stderr


@pytest.mark.exhaustive
def test_a_run_is_resumed_to_a_nearer_end_of_its_cosine(cohort: Cohort) -> None:
    """Which it must be told to."""
    run = cohort.folder / "cosine"
    cosine: dict[str, object] = {"run__dir": run, "learner__lr_schedule": "cosine"}
    process = cohort.start(**cosine, run__steps=500, run__checkpoint_every=2)
    wait_for(cohort.folder / "out.log", "step   8/500", process)
    process.kill()
    process.wait()
    steps = len(rows(run)) + 2
    more: dict[str, object] = {**cosine, "run__steps": steps, "run__resume": "true"}
    refused = cohort.train(**more)
    assert refused.returncode == 1, shown(refused)
    assert "Traceback" not in shown(refused) and "starting Ray" not in shown(refused)
    assert "the learning rate would jump from" in refused.stderr
    assert "run.allow_changed=[run.steps]" in refused.stderr
    resumed = cohort.train(**more, run__allow_changed="[run.steps]")
    assert resumed.returncode == 0, shown(resumed)
    assert "changed since the checkpoint" in resumed.stdout
    assert [row["step"] for row in rows(run)] == list(range(steps))
    rates = [row["learner/learning_rate"] for row in rows(run)]
    assert rates[-1] < 0.5 * rates[0], rates
    assert list(run.glob("replaced-*/config.yaml"))


@pytest.mark.exhaustive
def test_killed_engines_are_replaced_and_sigterm_saves(
    cohort: Cohort, nothing_left: Callable[[], None]
) -> None:
    """kill -9, in the middle of training, of the only engine's process, then of its actor; the run
    goes on. Then a polite signal: it saves and leaves."""
    run = cohort.folder / "lost"
    process = cohort.start(run__dir=run, run__steps=500)
    log = cohort.folder / "out.log"
    wait_for(log, "step   2/500", process)
    cohort.engine().kill()
    wait_for(log, "step  10/500", process)
    cohort.process("ray::RolloutActor").kill()
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


@pytest.mark.exhaustive
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
