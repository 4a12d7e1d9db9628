"""The examples of docs/environments.md for environments of other projects, run as they stand."""

from __future__ import annotations

import asyncio
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from episode_table import call, results

from cohort.rewards.config import TaskConfig
from cohort.rewards.environments.loading import BUILT_IN
from cohort.rewards.environments.specs import find_tools
from tests import needs

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
PAGE = (HERE.parents[1] / "docs" / "environments.md").read_text(encoding="utf-8")
CODE = {
    match[1]: match[0] for match in re.findall(r"```python\n(# (\S+\.py)\b.*?)```", PAGE, re.DOTALL)
}
SETTINGS = {
    task["environment"]: task
    for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    if "environment" in (task := yaml.safe_load(text)["task"])
}


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the page's files, in which this process is."""
    for name, text in CODE.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:/usr/bin:/bin")
    return tmp_path


def options_of(name: str) -> dict[str, Any]:
    options: dict[str, Any] = SETTINGS[name]["environment_options"]
    return options


def test_every_short_name_has_an_example() -> None:
    assert set(SETTINGS) == set(BUILT_IN)


@needs.package("skyrl_gym")
def test_skyrl_gym(at_table: Any) -> None:
    async def body(table: Any) -> None:
        row = {"reward_spec": {"method": "rule", "ground_truth": "5"}}
        made = await table.play(["#### 4", "#### 5"], max_tokens=200, **row)
        assert made.end.failure is None, made.end.failure
        assert made.end.rewards[-1] == 1.0

    at_table("skyrl_gym", body, options=options_of("skyrl_gym"), step_timeout_s=30)


def test_tools_of_an_mcp_server(at_table: Any) -> None:
    async def body(table: Any) -> None:
        made = await table.play([call("add", a=2, b=3), "5"], max_tokens=200)
        assert results(made) == ["5"]

    at_table("mcp", body, options=options_of("mcp"), step_timeout_s=60)


def test_a_class_with_tools_of_an_mcp_server(at_table: Any, files: Path) -> None:
    async def body(table: Any) -> None:
        said = [call("add", a=2, b=3) + call("answer", number=5), "Done."]
        made = await table.play(said, max_tokens=300, right=5)
        assert results(made) == ["5", "noted"]
        assert made.end.reward == 1.0

    at_table(f"{files / 'sums.py'}:Sums", body, options=options_of("mcp"), step_timeout_s=60)


@needs.bubblewrap
def test_a_class_with_a_reward_that_runs_in_the_folder(at_table: Any, files: Path) -> None:
    path = f"{files / 'coder.py'}:Coder"
    names = [tool["function"]["name"] for tool in find_tools(TaskConfig(environment=path))]
    assert names == ["python", "read_file", "write_file", "list_files"]

    async def body(table: Any) -> None:
        played = [
            table.play([call("write_file", path="add.py", text=text), "Done."], i, max_tokens=400)
            for i, text in enumerate(
                [
                    "def add(a, b): return a + b",
                    "def add(a, b): return a - b",
                    "while True: pass",
                    "import os; os._exit(0)",
                ]
            )
        ]
        made = await asyncio.gather(*played)
        assert [one.end.reward for one in made] == [1.0, 0.0, 0.0, 0.0]

    options = {**options_of("sandbox"), "seconds": 2}
    at_table(path, body, options=options, step_timeout_s=30)


@pytest.mark.skipif(
    importlib.util.find_spec("verifiers") is None,
    reason="verifiers 0.4.0 needs mcp==2.0.0 and openai<3: it is not installed here",
)
def test_verifiers(at_table: Any, files: Path) -> None:
    (files / "verifiers_sums.py").write_text((HERE / "verifiers_sums.py").read_text())

    async def body(table: Any) -> None:
        made = await table.play(["4", "5"], task=0)
        assert made.end.failure is None, made.end.failure
        assert made.end.reward == 0.5
        said = [(m["role"], m["content"]) for m in made.end.messages]
        assert said == [
            ("user", "2 + 3?"), ("assistant", "4"), ("user", "No. Again."), ("assistant", "5"),
        ]  # fmt: skip
        assert made.token_ids.tolist() == [*table.ids("4"), *table.ids("5")]

    options = {"taskset": "verifiers_sums", "role": "player"}
    path = f"{files / 'sums_agent.py'}:Verifiers"
    at_table(path, body, options=options, step_timeout_s=120, episode_timeout_s=200)
