"""An agent with a loop of its own: it asks the model with OpenAI's client, and asks again.

python examples/own_agent.py run.steps=40

A framework of agents is used in the same way: it takes the address and the key that `run` is given.
"""

import re
import sys
from collections.abc import Mapping
from typing import Any

import openai

import cohort

TRIES = 3


class SecondChance(cohort.Agent):
    """Asks for a sum until it is right: the sooner, the better."""

    async def run(self, row: Mapping[str, Any], base_url: str, api_key: str) -> float:
        client = openai.AsyncOpenAI(base_url=base_url, api_key=api_key)
        messages: list[Any] = list(row["prompt"])
        for tries in range(TRIES):
            reply = await client.chat.completions.create(model="policy", messages=messages)
            said = reply.choices[0].message
            if re.findall(r"\d+", said.content)[-1:] == [str(row["answer"])]:
                return 1.0 - tries / TRIES
            wrong = "That is wrong. Try again. Reply with the number only."
            messages += [said, {"role": "user", "content": wrong}]
        return 0.0


if __name__ == "__main__":
    overrides = [
        f"task.environment={__file__}:SecondChance",
        # The agent gives the reward; the task's own function would count the last reply as well.
        "rewards.functions=[]",
        "run.dir=runs/own_agent",
    ]
    config = cohort.load_config("deploy/configs/addition.yaml", [*overrides, *sys.argv[1:]])
    sys.exit(cohort.train(config))
