"""What a run records, with a real offline W&B."""

from __future__ import annotations

import json
import logging
import math
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cohort.actors.records import Completion, Group, Prompt, RewardError, ScoredGroup
from cohort.cluster.config import Config
from cohort.cluster.config_file import load_config
from cohort.cluster.observe import metrics_file, wandb_run
from cohort.cluster.observe.metrics_file import STEP_KEYS, read_metrics
from cohort.cluster.observe.rollouts import rollout_rows, table_rows
from cohort.cluster.observe.tracking import Tracker
from cohort.cluster.observe.wandb_run import WandbRun, wandb_mode
from tests.cluster.runs import write_rollouts


@pytest.fixture(autouse=True)
def no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: Any) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))


def config_with(*overrides: str) -> Config:
    return load_config(None, ["model.path=m", "tracking.wandb=disabled", *overrides])


def metrics_of(step: int, **changes: Any) -> dict[str, Any]:
    return {**dict.fromkeys(STEP_KEYS, 0.5), "step": step, **changes}


def steps_in(run_dir: Path) -> list[int]:
    return [row["step"] for row in read_metrics(run_dir / "metrics.jsonl")]


def scored_group(number: int, rewards: tuple[float | None, ...]) -> ScoredGroup:
    prompt = Prompt(
        id=f"p{number}",
        token_ids=(1, 2, 3),
        content=[{"role": "user", "content": f"Wie heißt Nummer {number}?"}],
    )
    completions = tuple(
        Completion(
            id=f"g{number}/{i}",
            prompt_id=prompt.id,
            token_ids=np.arange(i + 1, dtype=np.int64),
            logprobs=np.zeros(i + 1, dtype=np.float32),
            finish_reason="stop",
            seed=2**47 + i,
            weight_versions=(4, 5),
            text=f"answer {i}\n",
        )
        for i in range(len(rewards))
    )
    return ScoredGroup(
        group=Group(id=f"g{number}", prompt=prompt, completions=completions),
        by_function={"exact": rewards, "format": tuple(0.0 for _ in rewards)},
        totals=rewards,
        errors=tuple(
            RewardError("exact", completions[i].id, "raised", "boom")
            for i, reward in enumerate(rewards)
            if reward is None
        ),
        parts={"exact/close": tuple(0.5 for _ in rewards)},
        extra={"exact/found": tuple(f"found {i}" for i in range(len(rewards)))},
        sample_s=tuple(i / 4 for i in range(len(rewards))),
    )


# metrics.jsonl


def test_rows_are_on_disk_when_log_returns(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, config_with(), None)
    tracker.log(metrics_of(0, **{"reward/exact": 0.25}))
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert len(rows) == 1
    assert list(rows[0]) == [*STEP_KEYS, "reward/exact"]
    assert rows[0]["reward/exact"] == 0.25
    tracker.close()


def test_missing_keys_are_named(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, config_with(), None)
    metrics = metrics_of(0)
    del metrics["learner/loss"], metrics["time/wait"]
    with pytest.raises(ValueError, match="lack learner/loss, time/wait"):
        tracker.log(metrics)
    assert steps_in(tmp_path) == []


def test_a_value_that_is_no_number_is_named(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, config_with(), None)
    with pytest.raises(ValueError, match="metric reward/mean is not a number: 'high'"):
        tracker.log(metrics_of(0, **{"reward/mean": "high"}))
    assert steps_in(tmp_path) == []


def test_numbers_become_json(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, config_with(), None)
    odd = {
        "learner/loss": math.nan,
        "learner/grad_norm": -math.inf,
        "reward/mean": None,
        "reward/std": np.float32(0.5),
        "weights/version": np.int64(7),
    }
    tracker.log(metrics_of(0, **odd))
    text = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert [row[key] for key in odd] == [None, None, None, 0.5, 7]
    assert isinstance(row["weights/version"], int)


def test_a_step_is_logged_once(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, config_with(), None)
    tracker.log(metrics_of(3))
    with pytest.raises(ValueError, match="step 3 does not follow step 3"):
        tracker.log(metrics_of(3))
    assert steps_in(tmp_path) == [3]


def test_resume_drops_what_will_be_done_again(tmp_path: Path) -> None:
    first = Tracker(tmp_path, config_with(), None)
    for step in range(6):
        first.log(metrics_of(step, **{"reward/mean": 1.0}))
        write_rollouts(tmp_path / "rollouts", step, [scored_group(step, (1.0, 0.0))])
    # No close: the process died, in the middle of writing a row.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "rew')

    second = Tracker(tmp_path, config_with(), first.state(), first_step=4)
    assert steps_in(tmp_path) == [0, 1, 2, 3]
    assert len(list((tmp_path / "rollouts").iterdir())) == 4
    for step in range(4, 8):
        second.log(metrics_of(step, **{"reward/mean": 2.0}))
    second.close()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(8))
    assert [row["reward/mean"] for row in rows] == [1.0] * 4 + [2.0] * 4


def test_what_a_resume_drops_is_kept_elsewhere(tmp_path: Path) -> None:
    first = Tracker(tmp_path, config_with(), None)
    for step in range(4):
        first.log(metrics_of(step))
        write_rollouts(tmp_path / "rollouts", step, [scored_group(step, (1.0, 0.0))])
    texts = [(tmp_path / "rollouts" / f"step-{n:06d}.jsonl").read_text() for n in range(4)]
    rows = (tmp_path / "metrics.jsonl").read_text().splitlines(keepends=True)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "rew')
    for number, kept in ((1, 2), (2, 0)):
        Tracker(tmp_path, config_with(), None, first_step=kept).close()
        aside = tmp_path / f"replaced-{number:03d}"
        gone = range(2, 4) if number == 1 else range(2)
        torn = '{"step": 4, "rew' if number == 1 else ""
        assert (aside / "metrics.jsonl").read_text() == "".join(rows[n] for n in gone) + torn
        for step in gone:
            assert (aside / "rollouts" / f"step-{step:06d}.jsonl").read_text() == texts[step]
    # With nothing to keep there is no folder.
    Tracker(tmp_path, config_with(), None).close()
    assert not (tmp_path / "replaced-003").exists()


def test_rows_that_find_a_full_disk_are_written_with_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Tracker(tmp_path, config_with(), None)
    tracker.log(metrics_of(0))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(metrics_file.os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            tracker.log(metrics_of(1))
    # Not half of it, and nothing that a crash now would leave torn.
    assert steps_in(tmp_path) == [0]
    tracker.log(metrics_of(2))
    assert steps_in(tmp_path) == [0, 1, 2]


def test_resume_twice_from_the_same_checkpoint(tmp_path: Path) -> None:
    for _ in range(2):
        tracker = Tracker(tmp_path, config_with(), None, first_step=0)
        tracker.log(metrics_of(0))
        tracker.log(metrics_of(1))
        tracker.close()
    assert steps_in(tmp_path) == [0, 1]


def test_damage_in_the_middle_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"st\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl line 2 is not JSON"):
        Tracker(tmp_path, config_with(), None, first_step=3)


# rollouts/


def test_rollouts_hold_every_completion(tmp_path: Path) -> None:
    groups = [scored_group(0, (1.0, None)), scored_group(1, (0.0, 0.5))]
    returned = write_rollouts(tmp_path, 12, groups)
    files = list(tmp_path.iterdir())
    assert [file.name for file in files] == ["step-000012.jsonl"]
    text = files[0].read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    assert "heißt" in text
    assert [row["completion_id"] for row in rows] == ["g0/0", "g0/1", "g1/0", "g1/1"]
    assert rows[1] == {
        "step": 12,
        "group_id": "g0",
        "prompt_id": "p0",
        "completion_id": "g0/1",
        "prompt": [{"role": "user", "content": "Wie heißt Nummer 0?"}],
        "completion": "answer 1\n",
        "reward": None,
        "by_function": {"exact": None, "format": 0.0},
        "parts": {"exact/close": 0.5},
        "extra": {"exact/found": "found 1"},
        "reward_s": 0.25,
        "errors": [{"function": "exact", "cause": "raised", "message": "boom"}],
        "finish_reason": "stop",
        "weight_versions": [4, 5],
        "seed": 2**47 + 1,
        "prompt_tokens": 3,
        "tokens": 2,
        "token_ids": [0, 1],
        "episode": None,
    }
    assert rows[0]["errors"] == []
    assert returned == rows


def test_text_that_has_no_utf8_is_kept(tmp_path: Path) -> None:
    scored = scored_group(0, (1.0, 0.0))
    prompt = replace(scored.group.prompt, content="half a pair: \ud800, \\ud800")
    scored = replace(scored, group=replace(scored.group, prompt=prompt))
    returned = write_rollouts(tmp_path, 0, [scored])
    lines = (tmp_path / "step-000000.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == returned
    assert returned[0]["prompt"] == prompt.content


def test_table_takes_from_every_group_first() -> None:
    rows = [row for n in range(3) for row in rollout_rows(0, scored_group(n, (1.0, 0.0, 0.0)))]
    ids = [row["completion_id"] for row in table_rows(rows, 4)]
    assert ids == ["g0/0", "g1/0", "g2/0", "g0/1"]
    assert len(table_rows(rows, 100)) == 9
    assert table_rows(rows, 0) == []


# W&B


@pytest.mark.parametrize(
    ("setting", "environ", "expected"),
    [
        ("auto", {}, "offline"),
        ("auto", {"WANDB_API_KEY": "k"}, "online"),
        ("auto", {"WANDB_API_KEY": ""}, "offline"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "offline"),
        ("auto", {"WANDB_MODE": "disabled"}, "disabled"),
        ("online", {}, "online"),
        ("offline", {"WANDB_API_KEY": "k"}, "offline"),
        ("disabled", {"WANDB_API_KEY": "k"}, "disabled"),
    ],
)
def test_mode(tmp_path: Path, setting: str, environ: dict[str, str], expected: str) -> None:
    assert wandb_mode(setting, {"HOME": str(tmp_path), **environ}) == expected


def test_mode_reads_netrc(tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password key\n")
    assert wandb_mode("auto", {"HOME": str(tmp_path)}) == "online"
    elsewhere = {"HOME": str(tmp_path), "WANDB_BASE_URL": "https://wandb.example.org"}
    assert wandb_mode("auto", elsewhere) == "offline"
    other = tmp_path / "other"
    other.write_text("machine wandb.example.org login user password key\n")
    assert wandb_mode("auto", {**elsewhere, "NETRC": str(other)}) == "online"


def test_broken_netrc_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / ".netrc").write_text("nonsense here\n")
    assert wandb_mode("auto", {"HOME": str(tmp_path)}) == "offline"
    assert "no W&B key" in caplog.text


def inspect_run(folder: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
def test_offline_run_holds_what_was_logged(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = config_with("tracking.wandb=auto", "tracking.project=lab")
    tracker = Tracker(tmp_path, config, None)
    run_id = tracker.state()["wandb_id"]
    assert "offline" in tracker.describe()
    for step in range(3):
        if step != 1:
            rows = [
                row for n in range(2) for row in rollout_rows(step, scored_group(n, (1.0, None)))
            ]
            tracker.table(step, table_rows(rows, 3))
        tracker.log(metrics_of(step, **{"learner/loss": math.nan, "reward/mean": step / 10}))
    tracker.close(7)
    assert capfd.readouterr().out == ""

    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    assert folder.name.endswith(run_id)
    assert (tmp_path / "wandb_id").read_text().strip() == run_id
    text = json.dumps(inspect_run(folder))
    for expected in ("lab", "reward/mean", "rollout/samples", "samples_per_step"):
        assert expected in text
    tables = sorted((folder / "files" / "media" / "table").rglob("*.json"))
    assert len(tables) == 2
    table = json.loads(tables[0].read_text())
    assert table["columns"] == [
        "step",
        "weight_version",
        "prompt",
        "completion",
        "reward",
        "reward/exact",
        "reward/format",
        "tokens",
        "finish_reason",
    ]
    assert len(table["data"]) == 3
    assert table["data"][0][2:4] == ["user: Wie heißt Nummer 0?", "answer 0\n"]


@pytest.mark.slow
def test_resumed_run_keeps_its_id(tmp_path: Path) -> None:
    config = config_with("tracking.wandb=offline")
    first = Tracker(tmp_path, config, None)
    for step in range(5):
        first.log(metrics_of(step))
    state = first.state()
    first.close(1)
    second = Tracker(tmp_path, config, state, first_step=3)
    assert second.state() == state
    second.log(metrics_of(3))
    second.close(0)
    assert steps_in(tmp_path) == [0, 1, 2, 3]
    runs = list((tmp_path / "wandb").glob(f"offline-run-*-{state['wandb_id']}/*.wandb"))
    assert len(runs) >= 1


def test_a_crash_before_the_first_checkpoint_keeps_the_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WandbRun, "_start", lambda _self, _config: None)
    config = config_with("tracking.wandb=offline")
    first = Tracker(tmp_path, config, None)
    assert Tracker(tmp_path, config, None).state() == first.state()
    assert first.state()["wandb_id"]
    # A checkpoint knows better than the folder it was copied into.
    assert Tracker(tmp_path, config, {"wandb_id": "other"}).state() == {"wandb_id": "other"}
    assert Tracker(tmp_path, config, None).state() == {"wandb_id": "other"}


def test_disabled_touches_no_wandb(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, config_with(), {"wandb_id": "known"})
    tracker.log(metrics_of(0))
    tracker.close()
    assert not (tmp_path / "wandb").exists()
    assert tracker.state() == {"wandb_id": "known"}


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_online_without_a_key_warns_and_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tracker = Tracker(tmp_path, config_with("tracking.wandb=online"), None)
    tracker.log(metrics_of(0))
    tracker.close()
    assert len(warnings_of(caplog)) == 1
    assert "WANDB_API_KEY" in caplog.text
    assert steps_in(tmp_path) == [0]


def test_failing_start_warns_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    def refuse(**_: Any) -> None:
        raise wandb.errors.CommError("no such server")

    monkeypatch.setattr(wandb, "init", refuse)
    tracker = Tracker(tmp_path, config_with("tracking.wandb=offline"), None)
    tracker.table(0, rollout_rows(0, scored_group(0, (1.0, 0.0))))
    tracker.log(metrics_of(0))
    tracker.close()
    assert len(warnings_of(caplog)) == 1
    assert "no such server" in caplog.text
    assert "not available" in tracker.describe()
    assert steps_in(tmp_path) == [0]


class FakeRun:
    """A W&B run whose calls fail or hang on demand."""

    url = "https://example.org/run"

    def __init__(self, log_error: Exception | None = None, hang: threading.Event | None = None):
        self.log_error = log_error
        self.hang = hang
        self.finished: list[int] = []

    def define_metric(self, *_: Any, **__: Any) -> None:
        pass

    def log(self, _row: dict[str, Any]) -> None:
        if self.log_error:
            raise self.log_error

    def finish(self, exit_code: int) -> None:
        if self.hang:
            self.hang.wait(30)
        self.finished.append(exit_code)


def test_failing_log_warns_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    run = FakeRun(log_error=ConnectionResetError("the service is gone"))
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    tracker = Tracker(tmp_path, config_with("tracking.wandb=offline"), None)
    for step in range(3):
        tracker.log(metrics_of(step))
    tracker.close()
    assert len(warnings_of(caplog)) == 1
    assert "the service is gone" in caplog.text
    assert steps_in(tmp_path) == [0, 1, 2]


def test_hanging_start_is_bounded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    release, run = threading.Event(), FakeRun()

    def slow(**_: Any) -> FakeRun:
        release.wait(30)
        return run

    monkeypatch.setattr(wandb, "init", slow)
    monkeypatch.setattr(wandb_run, "WANDB_START_S", 0.2)
    began = time.monotonic()
    tracker = Tracker(tmp_path, config_with("tracking.wandb=offline"), None)
    assert time.monotonic() - began < 5
    assert "no answer" in caplog.text
    tracker.log(metrics_of(0))
    release.set()
    # A run that starts too late is finished, not left open.
    deadline = time.monotonic() + 10
    while not run.finished and time.monotonic() < deadline:
        time.sleep(0.01)
    assert run.finished == [1]
    assert len(warnings_of(caplog)) == 1


def test_hanging_finish_is_bounded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    hang = threading.Event()
    monkeypatch.setattr(wandb, "init", lambda **_: FakeRun(hang=hang))
    monkeypatch.setattr(wandb_run, "WANDB_FINISH_S", -9.8)
    tracker = Tracker(tmp_path, config_with("tracking.wandb=offline"), None)
    began = time.monotonic()
    tracker.close(0)
    assert time.monotonic() - began < 5
    assert "could not finish" in caplog.text
    hang.set()


def test_finish_gets_the_exit_code_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    run = FakeRun()
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    tracker = Tracker(tmp_path, config_with("tracking.wandb=offline"), None)
    tracker.close(3)
    tracker.close(0)
    assert run.finished == [3]


def test_wandb_is_told_to_be_one_quiet_resumable_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    seen: dict[str, Any] = {}

    def init(**given: Any) -> FakeRun:
        seen.update(given)
        return FakeRun()

    monkeypatch.setattr(wandb, "init", init)
    config = config_with("tracking.wandb=offline")
    Tracker(tmp_path, config, {"wandb_id": "abc"}).close()
    assert (seen["id"], seen["resume"], seen["dir"]) == ("abc", "allow", str(tmp_path))
    assert seen["name"] == tmp_path.name
    assert seen["config"] == config.model_dump(mode="json")
    assert seen["settings"].console == "off"
    assert seen["settings"].silent
