"""Every command in the README is run by continuous integration or by a test."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.config import all_keys, load_config

ROOT = Path(__file__).resolve().parents[1]

# Start of a command -> the file that runs it, and what to find there.
RUN_BY = {
    "make train": (".ci/run", "make train"),
    "make test": (".ci/run", "make test"),
    "make lint": (".ci/run", "make lint"),
    "cohort train": ("tests/system/test_train.py", "cohort.train("),
    "cohort keys": ("tests/test_readme.py", 'invoke(app, ["keys"])'),
    "cohort check": ("tests/system/test_check.py", 'cohort.arguments("check"'),
    "cohort eval": ("tests/system/test_train.py", 'cohort_command("eval"'),
    "cohort warmup": ("tests/system/test_warmup.py", '"warmup"'),
    "cohort export": ("tests/system/test_train.py", 'cohort_command("export"'),
    "cohort report": ("tests/cluster/test_report.py", '"report"'),
    ".venv/bin/python -m vllm.entrypoints.launchers.api_server.entry": (
        "tests/system/test_served_models.py",
        '"-m", "vllm.entrypoints.launchers.api_server.entry"',
    ),
    ".venv/bin/python deploy/ask_for_a_trip.py": (
        "tests/rewards/test_ask_for_a_trip.py",
        "ask_for_a_trip(",
    ),
    "cohort submit": ("tests/system/test_submit.py", "submit("),
}


def commands() -> list[str]:
    """The lines of the README's shell blocks, comments removed."""
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def test_the_readme_shows_commands() -> None:
    assert len(commands()) >= 8
    first_screen = (ROOT / "README.md").read_text().splitlines()[:25]
    assert any(line.startswith("make train") for line in first_screen)
    assert any(line.startswith("make test") for line in first_screen)


@pytest.mark.parametrize("command", commands())
def test_each_command_is_run_somewhere(command: str) -> None:
    start = next((key for key in RUN_BY if command.startswith(key)), None)
    assert start is not None, f"nothing runs `{command}`"
    file, text = RUN_BY[start]
    assert text in (ROOT / file).read_text()


@pytest.mark.parametrize("command", [c for c in commands() if ".yaml" in c and "cohort" in c])
def test_configs_and_overrides_in_the_readme_are_valid(command: str) -> None:
    words = shlex.split(command)
    [config] = [word for word in words if word.endswith(".yaml")]
    overrides = [word for word in words if re.match(r"[a-z]+\.[a-z_]+=", word)]
    load_config(ROOT / config, overrides)


def test_keys_named_in_the_readme_exist() -> None:
    known = set(all_keys())
    sections = {key.split(".")[0] for key in known}
    named = set(re.findall(r"`([a-z]+\.[a-z_]+)`", (ROOT / "README.md").read_text()))
    keys = {name for name in named if name.split(".")[0] in sections and "." in name}
    files = {"config.yaml", "metrics.jsonl", "report.html"}
    assert len(keys) > 15
    assert not {k for k in keys - known - files if not (ROOT / k).exists()}


def test_cohort_keys_lists_every_key_with_its_meaning() -> None:
    result = CliRunner().invoke(app, ["keys"])
    assert result.exit_code == 0
    lines = result.output.splitlines()
    assert [line.split("=")[0] for line in lines[0::2]] == all_keys()
    assert all(line.startswith("    ") and len(line) > 12 for line in lines[1::2])
