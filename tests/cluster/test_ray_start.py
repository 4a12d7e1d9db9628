"""Ray's start: what keeps it from starting is said in words, before or instead of a traceback."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import ray
from typer.testing import CliRunner

import cohort.cluster.ray_start
from cohort.actors.errors import TRY_AGAIN
from cohort.cluster.cli import app
from cohort.cluster.commands.check.run import check
from cohort.cluster.commands.evaluate import evaluate
from cohort.cluster.config import Config
from cohort.cluster.config_file import load_config
from cohort.cluster.errors import RunError
from cohort.cluster.observe.console import Console
from cohort.cluster.placement import GIB, Resources
from cohort.cluster.ray_start import (
    check_own_ray,
    check_reachable,
    check_start,
    connect,
    ray_address,
)

HERE = Resources(cpus=2, gpus=0, memory=8 * GIB, shared_memory=GIB)


def config(address: str | None = None) -> Config:
    keys = ["model.path=m"] + ([f"cluster.address={address}"] if address else [])
    return load_config(None, keys)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


def refusing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> list[dict[str, Any]]:
    """Ray's start fails; what it was called with."""
    calls: list[dict[str, Any]] = []

    def init(**options: Any) -> None:
        calls.append(options)
        raise error

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: calls.append({}))
    return calls


# Addresses ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [None, "local"])
def test_a_ray_of_our_own_joins_nobodys(monkeypatch: pytest.MonkeyPatch, given: str | None) -> None:
    assert ray_address(config(given)) is None
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(ray, "init", lambda **options: calls.append(options))
    assert connect(config(given), HERE) == HERE
    assert calls[0]["address"] == "local" and calls[0]["num_cpus"] == 2


def test_the_environment_names_the_cluster_where_the_config_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert ray_address(config()) == "head:6379"
    assert ray_address(config("other:6379")) == "other:6379"
    assert ray_address(config("local")) is None
    monkeypatch.setenv("RAY_ADDRESS", "")
    assert ray_address(config()) is None


def test_none_typed_as_the_default_is_shown_is_no_address() -> None:
    assert ray_address(config("None")) is None


@pytest.mark.parametrize(
    "address",
    ["foo", "foo:bar", ":6379", "host:", "host:0", "host:65536", "host:6379/x", "a b:1", "[::1",
     "::1:6379", "tcp://host:6379", "host:6379:1", "-", "host:-1"],
)  # fmt: skip
def test_what_is_no_address_is_refused_with_what_one_is(address: str) -> None:
    with pytest.raises(RunError, match=r"is not the address of a Ray cluster: give host:port"):
        check_reachable(address)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ray://head:10001", "Ray Client cannot hold a run.*cohort submit"),
        ("http://head:8265", "address of a dashboard.*cohort submit"),
        ("127.0.0.1:1", "cannot connect to Ray: .*refused"),
        ("[::1]:1", "cannot connect to Ray"),
        ("no-such-host.invalid:6379", "cannot connect to Ray"),
    ],
)
def test_other_addresses_are_refused_in_words(address: str, message: str) -> None:
    with pytest.raises(RunError, match=message) as caught:
        check_reachable(address)
    assert f"cluster.address={address}" in str(caught.value)


def test_a_name_too_long_for_the_resolver_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", f"{'x' * 70}:6379")
    with pytest.raises(RunError, match=r"\(from RAY_ADDRESS\): cannot connect to Ray"):
        check_start(config())


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConnectionError("nobody"), "cannot connect to Ray: ConnectionError: nobody"),
        (ValueError("what?"), "cannot connect to Ray: ValueError: what?"),
        (
            RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.40"),
            "another version of Ray or Python.*Ray: 2.40",
        ),
        (OSError("no file"), "cannot connect to Ray: OSError"),
    ],
)
def test_a_cluster_that_cannot_be_joined_is_said(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    refusing(monkeypatch, error)
    with pytest.raises(RunError, match=message):
        connect(config("head:6379"), HERE)


def test_no_ray_is_running_here(monkeypatch: pytest.MonkeyPatch) -> None:
    check_reachable("auto")
    refusing(monkeypatch, ConnectionError("Could not find any running Ray instance"))
    with pytest.raises(RunError, match=r"cluster\.address=auto: no Ray runs on this machine"):
        connect(config("auto"), HERE)


# A Ray of our own ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["TMPDIR", "RAY_TMPDIR"])
def test_a_folder_too_long_for_a_socket(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / ("x" * 90)
    folder.mkdir()
    monkeypatch.setenv(name, str(folder))
    with pytest.raises(RunError, match=rf"{name}=.* is too long: .* bytes.* 107: set RAY_TMPDIR"):
        check_own_ray()
    # Ray looks at RAY_TMPDIR first.
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    check_own_ray()


def test_the_longest_socket_is_that_of_this_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private.utils import validate_socket_filepath

    for length in range(1, 100):
        folder = "/" + "x" * length
        monkeypatch.setenv("RAY_TMPDIR", folder)
        monkeypatch.setattr(cohort.cluster.ray_start, "require_writable", lambda *_: None)
        name = cohort.cluster.ray_start.SOCKET.format(pid=cohort.cluster.ray_start._longest_pid())
        try:
            validate_socket_filepath(f"{folder}/{name}")
        except OSError:
            with pytest.raises(RunError, match="too long"):
                check_own_ray()
        else:
            check_own_ray()


@pytest.mark.parametrize("place", ["/proc/1", "/etc/hostname", "/proc/1/fd"])
def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.setenv("RAY_TMPDIR", place)
    with pytest.raises(RunError, match=rf"RAY_TMPDIR={place}.* cannot be written.*set RAY_TMPDIR"):
        check_own_ray()


def test_a_home_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/proc/1")
    with pytest.raises(RunError, match=r"HOME=/proc/1, .*cannot be written.*: set HOME"):
        check_own_ray()
    # A token that is given, or there already, needs no home that can be written.
    monkeypatch.setenv("RAY_AUTH_TOKEN", "token")
    check_own_ray()
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("token")
    check_own_ray()


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless(_: Any = None) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    with pytest.raises(RunError, match="HOME is not set"):
        check_own_ray()


@pytest.mark.parametrize("error", [OSError("socket"), ValueError("x"), RuntimeError("y\nz")])
def test_a_ray_that_does_not_start_is_said_and_cleared_away(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    calls = refusing(monkeypatch, error)
    with pytest.raises(RunError, match=rf"did not start on this machine: {type(error).__name__}"):
        connect(config(), HERE)
    assert calls[-1] == {}


# Each command -------------------------------------------------------------------------------------


def test_check_tries_it(monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tmp_path: Path) -> None:
    given = load_config(
        None,
        [f"model.path={tiny_model}", f"run.dir={tmp_path}/run", "actors.max_tokens=8",
         "model.dtype=float32"],
    )  # fmt: skip
    monkeypatch.setenv("RAY_TMPDIR", "/proc/1")
    lines: list[str] = []
    assert check(given, lines.append, 0) == 1
    assert "RAY_TMPDIR=/proc/1" in "\n".join(lines)


def test_eval_tries_it_before_it_starts_anything(tiny_model: Path) -> None:
    keys = [f"model.path={tiny_model}", "actors.max_tokens=8", "cluster.address=foo"]
    with (
        pytest.raises(RunError, match="is not the address of a Ray cluster"),
        Console(1, "plain") as console,
    ):
        asyncio.run(evaluate(load_config(None, keys), None, console))


@pytest.mark.parametrize("variable", ["RAY_TMPDIR", "HOME"])
def test_train_says_it_before_it_writes_anything(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(f"model: {{path: {tiny_model}}}\nactors: {{max_tokens: 8}}\n")
    monkeypatch.setenv(variable, "/proc/1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    done = CliRunner().invoke(app, ["train", str(file), f"run.dir={tmp_path}/run"])
    assert done.exit_code == 1
    assert f"{variable}=/proc/1" in done.stderr
    assert isinstance(done.exception, SystemExit)
    assert not (tmp_path / "run").exists()


def test_what_a_later_try_may_cure_is_told_to_who_starts_it_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A supervisor tries it again; an address that is none is left at once."""
    with pytest.raises(RunError) as caught:
        check_reachable("127.0.0.1:1")
    assert caught.value.exit_code == TRY_AGAIN
    refusing(monkeypatch, TimeoutError("the node timed out"))
    with pytest.raises(RunError) as caught:
        connect(config(), HERE)
    assert caught.value.exit_code == TRY_AGAIN
    with pytest.raises(RunError) as caught:
        check_reachable("http://127.0.0.1:8265")
    assert caught.value.exit_code == 1
