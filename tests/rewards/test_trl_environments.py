"""TRL's environments run unchanged: real trl describes the same tools to the model as we do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trl_environments
from episode_table import call, results
from transformers.utils.chat_template_utils import get_json_schema

from cohort.rewards.config import TaskConfig
from cohort.rewards.environments.specs import find_tools
from tests import needs

pytestmark = pytest.mark.slow

FILE = Path(trl_environments.__file__)
NAMES = ["Counter", "Echo", "Board", "Larger"]


def shown_by_trl(factory: Any, model: Path, folder: Path) -> list[dict[str, Any]]:
    """The schemas that TRL's trainer gives to the chat template for an environment."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(model)
    # One that TRL knows to parse tool calls of.
    tokenizer.chat_template = (Path(__file__).parents[1] / "templates" / "qwen3.jinja").read_text(
        encoding="utf-8"
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model),
        processing_class=tokenizer,
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        args=GRPOConfig(output_dir=str(folder), use_cpu=True, bf16=False, report_to="none"),
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": "Go."}]}]),
        environment_factory=factory,
    )
    return [get_json_schema(tool) for tool in trainer._env_tools[None]]


@needs.package("trl")
@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_told_the_same_tools_as_by_trl(
    tiny_model: Path, tmp_path: Path, name: str
) -> None:
    theirs = shown_by_trl(getattr(trl_environments, name), tiny_model, tmp_path)
    ours = find_tools(TaskConfig(environment=f"{FILE}:{name}"))
    # TRL lists them by their names, we in the order in which they are written.
    assert sorted(ours, key=lambda tool: tool["function"]["name"]) == theirs
    assert theirs


def test_a_counter(at_table: Any) -> None:
    async def body(table: Any) -> None:
        made = await table.play(
            [call("increment", step=3), call("decrement"), "Two."], max_tokens=300, target=2
        )
        assert results(made) == ["3", "2"]
        assert (made.end.reward, made.end.stop_reason) == (1.0, "answered")

    at_table(f"{FILE}:Counter", body)


def test_a_tool_that_is_called_step(at_table: Any) -> None:
    async def body(table: Any) -> None:
        made = await table.play([call("step", message="hello"), "Done."], max_tokens=300, word="hi")
        assert made.end.messages[0]["content"] == "Echo hi."
        assert results(made) == ["hello"]
        assert made.end.reward == 5.0

    at_table(f"{FILE}:Echo", body)


def test_tools_of_every_kind(at_table: Any) -> None:
    async def body(table: Any) -> None:
        said = call("move", direction="up", cells=[1, 2]) + call("rules", topic="mercy")
        made = await table.play([said, call("of_size", size=2), "Done."], max_tokens=400)
        assert results(made) == [
            '{"moves": 1}', "no mercy",
            "error: there is no tool 'of_size'; the tools are jump, move, rules",
        ]  # fmt: skip

    at_table(f"{FILE}:Larger", body)
