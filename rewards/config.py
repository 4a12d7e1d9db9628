"""The `task` and `rewards` sections of the config."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from cohort.actors.plain import JsonObject


class TaskConfig(BaseModel):
    """Where prompts come from, and how many of them make one step."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(
        "addition",
        description="A built-in task (addition, dataset, reasoning_gym, mixture, travel), or "
        "module:Class, or path.py:Class.",
    )
    data: str | None = Field(
        None,
        description="Training rows of the dataset task: a file (jsonl, json, csv, parquet), a "
        "glob, a folder, or a Hugging Face dataset like org/name?config=main&split=train.",
    )
    eval_data: str | None = Field(
        None, description="Held-out rows of the dataset task. Empty: a split of `data`."
    )
    options: JsonObject = Field(
        default_factory=dict, description="Keyword arguments of the task's class."
    )
    environment: str | None = Field(
        None,
        description="A class that answers the model's replies, as module:Class or path.py:Class: "
        "with reset and step, with public methods that are tools, or an Agent that asks the model "
        "itself; or mcp, openenv, sandbox or skyrl_gym. Empty: one reply a prompt.",
    )
    environment_options: JsonObject = Field(
        default_factory=dict, description="Keyword arguments of the environment's class."
    )
    history: Literal["append", "template"] = Field(
        "append",
        description="Where the chat template would rewrite earlier turns (Qwen3 drops their "
        "thinking): append new messages all the same, or go on from the template's own text, "
        "which shares the tokens up to where it differs.",
    )
    prompts_per_step: int = Field(8, ge=1, description="Prompts (groups) of one training step.")
    group_size: int = Field(8, ge=2, description="Completions of one prompt.")
    overlong: Literal["error", "drop"] = Field(
        "error",
        description="Prompts that leave no room for a completion: stop before the start, or leave "
        "them out and say how many.",
    )
    solved_at: float = Field(
        1.0, description="Total reward from which a completion counts as solved (`cohort eval`)."
    )
    eval_prompts: int = Field(64, ge=1, description="Held-out prompts that `cohort eval` uses.")


class RewardFunctionConfig(BaseModel):
    """One reward function, its weight in the total, and what it is given."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str = Field(
        description="A built-in reward (maths), module:function or path.py:function; a class is "
        "constructed."
    )
    weight: float = Field(
        1.0, allow_inf_nan=False, description="Factor of this function in the total reward."
    )
    kind: Literal["trl", "verl", "openrlhf"] = Field(
        "trl",
        description="Its signature: TRL's, verl's compute_score, OpenRLHF's reward_func.",
    )
    options: JsonObject = Field(default_factory=dict, description="Its keyword arguments.")
    columns: dict[str, str] = Field(
        default_factory=dict, description="Argument: dataset column, where the names differ."
    )
    secrets: list[str] = Field(
        default_factory=list,
        description="Environment variables, such as keys and addresses, that the reward children "
        "may see besides harmless ones (PATH, HOME, PYTHON*, caches, threads).",
    )
    sources: list[str] = Field(
        default_factory=list,
        description="Rows of these sources only (parts of a mixture); for others the function does "
        "not apply. Empty: all rows.",
    )
    whole_group: bool | None = Field(
        None,
        description="false: it scores each completion by itself, and is called as completions "
        "come. true: it compares completions, and is never called with part of a group. Empty: as "
        "the function says (per_completion), and with the whole group where it says nothing.",
    )


class RewardsConfig(BaseModel):
    """Reward workers, and the functions that they run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    workers: int = Field(1, ge=1, description="Reward workers, each with a child process.")
    functions: list[RewardFunctionConfig | str] | None = Field(
        None,
        description="Reward functions: built-in ones by name, others by path. Empty: the task's.",
    )
    timeout_s: float = Field(
        30,
        gt=0,
        allow_inf_nan=False,
        description="Deadline for one call of a function; then its child is killed, and the call's "
        "completions are scored one by one, in as much time again.",
    )
    memory_gb: float | None = Field(
        4,
        gt=0,
        allow_inf_nan=False,
        description="Memory (GiB) that a reward child may use; null: no bound.",
    )
    max_error_rate: float = Field(
        0.1,
        ge=0,
        le=1,
        description="Fraction of a step's scores that may fail without ending the run.",
    )

    @property
    def memory_bytes(self) -> int | None:
        return None if self.memory_gb is None else int(self.memory_gb * 2**30)


class EnvironmentsConfig(BaseModel):
    """Workers that run `task.environment`, and the limits of an episode."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    workers: int = Field(
        1, ge=1, description="Workers; each plays many episodes at once in a child process."
    )
    max_turns: int = Field(8, ge=1, description="Replies of the model in an episode.")
    max_tool_calls: int = Field(32, ge=0, description="Calls of tools in an episode.")
    step_timeout_s: float = Field(
        30,
        gt=0,
        allow_inf_nan=False,
        description="Deadline for one answer of an environment; then its episode has failed.",
    )
    episode_timeout_s: float = Field(
        600,
        gt=0,
        allow_inf_nan=False,
        description="Deadline for an episode: no turn begins after it, and it ends with what it "
        "has earned.",
    )
    message_chars: int = Field(
        20_000,
        ge=1,
        description="Longest message of an environment, in characters; the rest is left out, which "
        "the message says.",
    )
    memory_gb: float | None = Field(
        4,
        gt=0,
        allow_inf_nan=False,
        description="Memory (GiB) of a worker's child process; null: no bound.",
    )
    secrets: list[str] = Field(
        default_factory=list,
        description="Environment variables that environments may see besides harmless ones.",
    )
    tool_parser: str = Field(
        "auto",
        description="How the model writes calls of tools: hermes, llama3_json, mistral, or one of "
        "vLLM's parsers. auto: what its chat template prints.",
    )

    @property
    def memory_bytes(self) -> int | None:
        return None if self.memory_gb is None else int(self.memory_gb * 2**30)
