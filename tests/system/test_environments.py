"""Whole runs with environments of other projects, their real packages and the real stack.

Where episodes need tool calls, a tiny model learns to make them from demonstrations first.
"""

from __future__ import annotations

import json
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import needs
from tests.models import tiny_llama
from tests.serving import serving
from tests.system.conftest import COHORT, CONFIG, Cohort
from tests.system.runs import rollouts, rows

pytestmark = [pytest.mark.system, pytest.mark.exhaustive]

HERE = Path(__file__).resolve().parent
MCP_SERVER = HERE.parent / "rewards" / "mcp_server.py"
OPENENV_SERVER = HERE.parent / "rewards" / "openenv_echo.py"
# It needs mcp<2, and vLLM mcp>=2.
OPENENV = "openenv==0.10.0"
ROOM = 4096


@pytest.fixture(scope="module")
def roomy_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with room for the descriptions of tools."""
    folder = tiny_llama(tmp_path_factory.mktemp("models") / "roomy")
    for name, key in (
        ("config.json", "max_position_embeddings"),
        ("tokenizer_config.json", "model_max_length"),
    ):
        settings = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(settings | {key: ROOM}))
    return folder


@pytest.fixture(scope="module")
def openenv_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of the real package, in a virtual environment of its own."""
    folder = tmp_path_factory.mktemp("openenv")
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "--quiet", OPENENV], check=True)
    with serving(python, OPENENV_SERVER, "16") as url:
        yield url


def questions(file: Path, **columns: Any) -> Path:
    """A dataset of a few questions, with the same columns in each row."""
    asked = [
        {"prompt": [{"role": "user", "content": f"What is {n} + 3?"}], "answer": str(n + 3)}
        for n in range(16)
    ]
    file.write_text("".join(json.dumps(row | columns) + "\n" for row in asked))
    return file


def train(cohort: Cohort, folder: Path, model: Path, **keys: Any) -> list[dict[str, Any]]:
    """Two steps; the completions of both. Nothing may have failed, and none may be missing."""
    settings = {
        "model.path": model, "run.dir": folder, "task.group_size": 4,
        "task.prompts_per_step": 2, "environments.max_turns": 3, "learner.learning_rate": 1e-4,
    }  # fmt: skip
    done = cohort.train(
        **{key.replace(".", "__"): value for key, value in (settings | keys).items()}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = [sample for step in (0, 1) for sample in rollouts(folder, step)]
    assert len(found) == 16
    for row in rows(folder):
        assert row["samples/failed"] == 0
        assert row["mismatch/logprob_abs_max"] < 5e-3
    return found


def calls_in_training(
    cohort: Cohort, model: Path, tool: str, arguments: dict[str, Any], played: str, trained: str
) -> None:
    """A model that has learned to call a tool calls it in training, and reads what it answers.

    played, trained: keys of the environment, for its demonstrations and for training.
    """
    call = f"<tool_call>\n{json.dumps({'name': tool, 'arguments': arguments})}\n</tool_call>"
    keys = {
        "task.name": "dataset",
        "task.data": questions(cohort.folder / f"{tool}.jsonl", shown=[call, call, "7"]),
        "task.options": "{demonstration: shown}",
        "actors.max_tokens": 96,
        "model.max_length": ROOM,
    }
    warm, run = cohort.folder / f"{tool}-warm", cohort.folder / tool
    warmed = cohort.run(
        COHORT, "warmup", CONFIG, str(warm), "--steps", "80", "--batch-size", "4",
        "--learning-rate", "3e-3", f"model.path={model}", "model.dtype=float32",
        *(f"{key}={value}" for key, value in keys.items()), *played.split("\n"),
    )  # fmt: skip
    assert warmed.returncode == 0, warmed.stdout + warmed.stderr
    more = dict(line.split("=", 1) for line in trained.split("\n"))
    found = train(cohort, run, warm, **keys, **more)
    told = [
        message["content"]
        for sample in found
        for message in sample["episode"]["messages"]
        if message["role"] == "tool"
    ]
    assert sum("5" in content for content in told) > len(found) / 4, told
    assert rows(run)[0]["episodes/turns"] > 1


def test_mcp(cohort: Cohort, roomy_model: Path, nothing_left: Callable[[], None]) -> None:
    """Over HTTP, and over stdio with a server of each episode's own."""

    def keys(server: dict[str, Any]) -> str:
        options = json.dumps({"servers": {"sums": server}, "tools": ["add"]})
        return f"task.environment=mcp\ntask.environment_options={options}"

    stdio = keys({"command": sys.executable, "args": [str(MCP_SERVER)]})
    with serving(sys.executable, MCP_SERVER) as url:
        http = keys({"url": f"{url}/mcp"})
        calls_in_training(cohort, roomy_model, "add", {"a": 2, "b": 3}, http, stdio)
    nothing_left()


@needs.bubblewrap
def test_sandbox(cohort: Cohort, roomy_model: Path, nothing_left: Callable[[], None]) -> None:
    keys = "task.environment=sandbox\ntask.environment_options={seconds: 20}"
    code = {"code": "print(2 + 3)"}
    calls_in_training(cohort, roomy_model, "python", code, keys, keys)
    nothing_left()


@needs.package("skyrl_gym")
def test_skyrl_gym(cohort: Cohort, tiny_model: Path, nothing_left: Callable[[], None]) -> None:
    data = questions(
        cohort.folder / "rows.jsonl", reward_spec={"method": "rule", "ground_truth": "5"}
    )
    run = cohort.folder / "skyrl"
    keys = {
        "task.name": "dataset",
        "task.data": data,
        "task.environment": "skyrl_gym",
        "rewards.functions": "null",
        "task.environment_options": '{"env": "gsm8k_multi_turn", "extras": {"max_turns": 3}}',
    }
    found = train(cohort, run, tiny_model, **keys)
    # A random model's answers are wrong: the environment asks again, in its own words.
    messages = [message for sample in found for message in sample["episode"]["messages"]]
    assert any("tentative numeric answer" in message["content"] for message in messages)
    assert rows(run)[0]["episodes/turns"] > 1
    nothing_left()


def test_openenv(
    cohort: Cohort, tiny_model: Path, openenv_url: str, nothing_left: Callable[[], None]
) -> None:
    data = questions(cohort.folder / "names.jsonl", name="Ann")
    run = cohort.folder / "openenv"
    options = {"url": openenv_url, "text": "message", "show": "echoed", "columns": ["name"]}
    keys = {
        "task.name": "dataset",
        "task.data": data,
        "task.environment": "openenv",
        "rewards.functions": "null",
        "task.environment_options": json.dumps(options),
    }
    for sample in train(cohort, run, tiny_model, **keys):
        messages = sample["episode"]["messages"]
        said = [m["content"] for m in messages if m["role"] == "assistant"]
        # The server's first words join the question; then it echoes.
        assert "Hello Ann" in messages[-2 * len(said)]["content"], messages
        assert sample["reward"] == sum(range(1, len(said) + 1))
    nothing_left()
