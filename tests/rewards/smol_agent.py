"""An agent of the package smolagents, as its users write them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from smolagents import OpenAIModel, ToolCallingAgent, tool

import cohort


@tool
def price(hotel: str) -> str:
    """Price of a stay.

    Args:
        hotel: Its name.
    """
    return f"90 EUR at {hotel}"


class Travel(cohort.Agent):
    """smolagents forces a call of a tool unless it is told not to."""

    def run(self, row: Mapping[str, Any], base_url: str, api_key: str, model: str) -> float:
        policy = OpenAIModel(model, api_base=base_url, api_key=api_key, tool_choice="auto")
        agent = ToolCallingAgent([price], policy, max_steps=4, verbosity_level=0)
        # Its own is 6,000 letters long.
        agent.prompt_templates["system_prompt"] = "You call tools."
        self.answer = agent.run(row["prompt"][-1]["content"])
        return float(self.answer == row["answer"])
