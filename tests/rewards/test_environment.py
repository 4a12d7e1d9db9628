"""What reward code sees of the environment: harmless variables, and those it names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cohort.rewards.environment import scrubbed_environment

SECRETS = [
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "DATABASE_URL",
    "GH_PAT",
    "GITHUB_TOKEN",
    "PIP_INDEX_URL",
    "PIP_EXTRA_INDEX_URL",
    "UV_INDEX_URL",
    "WANDB_API_KEY",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "OPENAI_API_KEY",
    "REDIS_URL",
    "SENTRY_DSN",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "KUBECONFIG",
    "SSH_AUTH_SOCK",
    "AZURE_STORAGE_CONNECTION_STRING",
    "SLACK_WEBHOOK",
    "NETRC",
    "MYSQL_PWD",
    "PGPASSFILE",
    "DOCKER_AUTH_CONFIG",
    "NPM_CONFIG__AUTH",
    "RAY_RUNTIME_ENV",
    "PYTHON_API_TOKEN",
    "PYTHON_KEYRING_PASSWORD",
    "COHORT_SECRET",
    "LC_SECRET",
]
HARMLESS = [
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "TMPDIR",
    "TZ",
    "PYTHONPATH",
    "PYTHONHASHSEED",
    "LD_LIBRARY_PATH",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "TOKENIZERS_PARALLELISM",
    "NO_PROXY",
    "https_proxy",
]


def test_only_harmless_variables_pass() -> None:
    environment = {name: "value" for name in SECRETS + HARMLESS}
    assert sorted(scrubbed_environment(environment)) == sorted(HARMLESS)


@pytest.mark.parametrize(
    ("value", "passes"),
    [
        ("http://proxy:3128", True),
        ("proxy:3128", True),
        ("http://me:word@proxy:3128", False),
        ("socks5h://token@proxy", False),
    ],
)
def test_a_proxy_with_a_password_does_not_pass(value: str, passes: bool) -> None:
    assert ("HTTPS_PROXY" in scrubbed_environment({"HTTPS_PROXY": value})) == passes


def test_what_a_function_names_passes() -> None:
    environment = {"DATABASE_URL": "postgres://u:p@h/d", "GH_PAT": "x", "PATH": "/bin"}
    assert scrubbed_environment(environment, {"DATABASE_URL"}) == {
        "DATABASE_URL": "postgres://u:p@h/d",
        "PATH": "/bin",
    }


SPY = """
import os, sys
def spy(completions, **_):
    shown = open(f"/proc/{os.getppid()}/environ", "rb").read() + repr(os.environ).encode()
    if b"hunter2" in shown:
        raise ValueError("a secret is seen")
    return [float(b"PATH=" in shown)] * len(completions)
"""
ACTOR = """
import os, subprocess, sys
import numpy as np
from cohort.actors.records import Completion, Group, Prompt
from cohort.rewards.specs import RewardSpec
from cohort.rewards.worker import RewardWorker
completion = Completion("c", "p", np.arange(1), np.zeros(1), "stop", 0, (0, 0), "a")
group = Group("g", Prompt("p", (1,), "Q", {}), (completion,))
actor = RewardWorker([RewardSpec("spy", sys.argv[1])], 20)
meta, _ = actor.score(group)
actor.close()
told = subprocess.run(["printenv", "GH_PAT"], capture_output=True, text=True).stdout.strip()
print(meta.totals, meta.errors, os.environ["GH_PAT"], told, sep="|")
"""


def test_a_child_finds_no_secret_in_its_parents_environment(tmp_path: Path) -> None:
    """The actor itself, and what it starts, keeps its variables."""
    file = tmp_path / "spy.py"
    file.write_text(SPY)
    secrets = {name: "hunter2" for name in ("GH_PAT", "DATABASE_URL", "AWS_ACCESS_KEY_ID")}
    done = subprocess.run(
        [sys.executable, "-c", ACTOR, f"{file}:spy"],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, **secrets},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.strip() == "(1.0,)|()|hunter2|hunter2", done.stderr
