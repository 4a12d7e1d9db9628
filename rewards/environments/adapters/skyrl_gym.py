"""Environments of SkyRL-gym: `task.environment: skyrl_gym`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

try:
    import skyrl_gym
    from omegaconf import OmegaConf
except ImportError as error:
    raise ImportError(f"{error}: install it with pip install 'cohort-rl[skyrl-gym]'") from error

from cohort.rewards.environments.base import Message, Reply, Step
from cohort.rewards.loading import load_attribute
from cohort.rewards.results import MAX_SCORE


class SkyRLGym:
    """Plays an environment of SkyRL-gym, unchanged.

    The row's columns are its `extras`, as in SkyRL. Numbers in a step's `metadata`, and those of
    `get_metrics`, become metrics. What was sampled stays as it is: a `postprocessed_action` that
    differs from the reply is counted as the metric `postprocessed` and not put in its place.

    Args:
        env: Its name in SkyRL-gym's registry, or module:Class or path.py:Class of your own.
        config: Its `env_config`.
        extras: Added to every row's columns (`max_turns`, for one); a column goes first.

    Example:
        task.environment: skyrl_gym
        task.environment_options: {env: gsm8k_multi_turn, extras: {max_turns: 3}}
    """

    def __init__(
        self,
        env: str,
        config: Mapping[str, object] | None = None,
        extras: Mapping[str, object] | None = None,
    ) -> None:
        if ":" in env:
            self._make = load_attribute(env)
        else:
            # Raises here, and not in the first episode, where there is no such environment.
            self._make = skyrl_gym.spec(env).make
        self._config = OmegaConf.create(dict(config or {}))
        self._extras = dict(extras or {})
        self._env: Any = None

    def reset(self, row: Mapping[str, Any], seed: int) -> list[Message]:  # noqa: ARG002
        """Make the environment of a row; SkyRL-gym has no seeds."""
        columns = {name: value for name, value in row.items() if name != "prompt"}
        self._env = self._make(env_config=self._config, extras={**self._extras, **columns})
        prompt = row["prompt"]
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        begun, _ = self._env.init(copy.deepcopy(prompt))
        if list(begun[: len(prompt)]) != list(prompt):
            raise ValueError(
                f"{type(self._env).__name__}.init rewrites the row's prompt; it may only add "
                "messages. Put what it writes into the dataset"
            )
        return list(begun[len(prompt) :])

    def step(self, reply: Reply) -> Step:
        """One step of the environment."""
        made = self._env.step(reply.text)
        action = made.get("postprocessed_action")
        metrics = _numbers({**(made.get("metadata") or {}), **self._env.get_metrics()})
        if action is not None and action != reply.text:
            metrics["postprocessed"] = 1.0
        return Step(list(made["observations"]), made["reward"], made["done"], metrics)

    def close(self) -> None:
        """Close the environment."""
        if self._env is not None:
            self._env.close()


def _numbers(found: Mapping[str, object]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in found.items()
        if isinstance(value, int | float) and abs(value) <= MAX_SCORE
    }
