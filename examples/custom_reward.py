"""A reward function of your own, and a run that uses it.

python examples/custom_reward.py run.steps=10
"""

import json
import re
import sys

import cohort


def near(completions, answer, **columns):
    """1 for the right sum, less the further the last number of the completion is away from it.

    A function gets the completions of a group and, by its name, each column of their row: here
    `answer`, which the addition task writes. It returns one number for each completion.
    """
    scores = []
    for completion, right in zip(completions, answer, strict=True):
        numbers = re.findall(r"\d+", completion[0]["content"])
        scores.append(1 / (1 + abs(int(numbers[-1]) - right)) if numbers else 0.0)
    return scores


if __name__ == "__main__":
    near_path = json.dumps(f"{__file__}:near")  # quoted, as folders may have any name
    functions = f"rewards.functions=[{near_path}, {{path: number_only, weight: 0.1}}]"
    overrides = [functions, "run.dir=runs/custom_reward", *sys.argv[1:]]
    sys.exit(cohort.train(cohort.load_config("deploy/configs/addition.yaml", overrides)))
