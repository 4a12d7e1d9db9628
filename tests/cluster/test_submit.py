"""What `submit` checks before a cluster is asked, and how it follows a job."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from ray.job_submission import JobStatus

from cohort.cluster.commands import submit as module
from cohort.cluster.commands.submit import (
    EXCLUDES,
    SubmitError,
    _explain,
    _Follower,
    job_words,
    submit,
)
from cohort.cluster.config import ConfigError
from cohort.cluster.config_file import parse_overrides


@pytest.fixture
def project(tmp_path: Path) -> Path:
    folder = tmp_path / "my project"
    (folder / "configs").mkdir(parents=True)
    (folder / "configs" / "a b.yaml").write_text("model: {path: m}\nrun: {dir: /runs/x}\n")
    return folder


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)


def test_command_survives_the_shell(project: Path) -> None:
    overrides = ["tracking.name=it's; rm -rf $HOME", "--run.steps", "3", "run.dir=/runs/a b"]
    words = job_words(project / "configs" / "a b.yaml", overrides, project)
    assert words[:2] == ["train", "configs/a b.yaml"]
    assert parse_overrides(words[2:]) == parse_overrides(overrides)


def test_config_outside_of_the_working_directory(project: Path, tmp_path: Path) -> None:
    outside = tmp_path / "config.yaml"
    outside.write_text("model: {path: m}\nrun: {dir: /runs/x}\n")
    with pytest.raises(SubmitError, match="is not inside the working directory"):
        job_words(outside, [], project)


@pytest.mark.parametrize("folder", ["runs", ".venv"])
def test_config_that_is_never_uploaded(project: Path, folder: str) -> None:
    assert folder in EXCLUDES
    (project / folder).mkdir()
    config = project / folder / "config.yaml"
    config.write_text("model: {path: m}\nrun: {dir: /runs/x}\n")
    with pytest.raises(SubmitError, match=f"is in '{folder}', which is never uploaded"):
        job_words(config, [], project)


@pytest.mark.parametrize("run_dir", ["runs/x", "~/runs/x", "$HOME/runs"])
def test_run_dir_must_be_absolute(project: Path, run_dir: str) -> None:
    with pytest.raises(SubmitError, match=r"run\.dir=.* is not absolute"):
        job_words(project / "configs" / "a b.yaml", [f"run.dir={run_dir}"], project)


def test_wrong_config_is_known_before_the_cluster_is_asked(project: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean run\.steps"):
        submit(project / "configs" / "a b.yaml", "nowhere", ["run.step=1"], working_dir=project)


def test_working_directory_must_be_a_folder(project: Path) -> None:
    config = project / "configs" / "a b.yaml"
    with pytest.raises(SubmitError, match="is not a folder"):
        job_words(config, [], config)


def test_nobody_there(project: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(SubmitError, match=f"no Ray job server answers at http://127.0.0.1:{port}"):
        submit(project / "configs" / "a b.yaml", f"127.0.0.1:{port}", [], working_dir=project)


def test_somebody_there_who_does_not_answer(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REACH_S", 0.2)
    began = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(SubmitError, match="no Ray job server answers"):
            submit(project / "configs" / "a b.yaml", address, [], working_dir=project)
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("address", ["ray://head:10001", "auto://x"])
def test_addresses_that_are_no_dashboard(project: Path, address: str) -> None:
    with pytest.raises(SubmitError, match="not the address of a Ray dashboard"):
        submit(project / "configs" / "a b.yaml", address, [], working_dir=project)


def test_environment_must_not_redirect_the_job(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://elsewhere:8265")
    with pytest.raises(SubmitError, match="RAY_ADDRESS=http://elsewhere:8265 would replace"):
        submit(project / "configs" / "a b.yaml", "http://here:8265", [], working_dir=project)


def test_too_large_a_folder_names_what_is_large(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x" * 3 * 2**20)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "ignored").write_bytes(b"x" * 5 * 2**20)
    error = RuntimeError("Package size (600MiB) exceeds the maximum size of 512MiB")
    message = _explain(error, "http://here:8265", tmp_path)
    assert "too large" in message
    assert "The largest entries are model.bin 3 MiB" in message


class FakeClient:
    """A job server whose connections break as scripted; every one repeats the log."""

    def __init__(self, logs: list[list[str] | Exception], **info: Any) -> None:
        self.logs = logs
        self.info = {"status": JobStatus.SUCCEEDED, "driver_exit_code": 0, "message": "", **info}

    async def tail_job_logs(self, _job_id: str) -> AsyncIterator[str]:
        log = self.logs.pop(0)
        if isinstance(log, Exception):
            raise log
        for chunk in log:
            if chunk == "BREAK":
                raise RuntimeError("connection closed")
            yield chunk

    def get_job_info(self, _job_id: str) -> Any:
        status = JobStatus.RUNNING if self.logs else self.info["status"]
        return type("Info", (), {**self.info, "status": status})


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.time, "sleep", lambda _: None)


@pytest.mark.usefixtures("patient")
def test_following_over_lost_connections(capsys: pytest.CaptureFixture[str]) -> None:
    logs: list[list[str] | Exception] = [
        ["one\n", "two\n", "BREAK"],
        OSError("unreachable"),
        ["one\ntwo\nthr", "ee\n"],
        ["one\ntwo\nthree\n", "four\n"],
    ]
    assert _Follower(FakeClient(logs), "job", "http://here").run() == 0
    assert capsys.readouterr().out == "one\ntwo\nthree\nfour\njob: SUCCEEDED\n"


@pytest.mark.parametrize(
    ("info", "code", "shown"),
    [
        ({"status": JobStatus.FAILED, "driver_exit_code": 7, "message": "tail"}, 7, "FAILED\n"),
        (
            {"status": JobStatus.FAILED, "driver_exit_code": None, "message": "no such image"},
            1,
            "FAILED\nno such image\n",
        ),
        ({"status": JobStatus.STOPPED, "driver_exit_code": 143}, 130, "STOPPED\n"),
    ],
)
def test_exit_codes(
    capsys: pytest.CaptureFixture[str], info: dict[str, Any], code: int, shown: str
) -> None:
    assert _Follower(FakeClient([["log\n"]], **info), "job", "http://here").run() == code
    assert capsys.readouterr().out == f"log\njob: {shown}"


@pytest.mark.usefixtures("patient")
def test_a_silent_cluster_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SILENCE_S", 0.05)

    class Silent(FakeClient):
        async def tail_job_logs(self, _job_id: str) -> AsyncIterator[str]:
            threading.Event().wait(0.02)
            raise OSError("unreachable")
            yield ""

    with pytest.raises(SubmitError, match=r"lost contact with job \(OSError: unreachable\)"):
        _Follower(Silent([]), "job", "http://here").run()
