"""GRPO in one loop: a small model learns to add. Run `make setup` first, then this file."""

import asyncio
import sys

import cohort


async def main(overrides: list[str]) -> None:
    config = cohort.load_config("deploy/configs/addition.yaml", overrides)
    async with cohort.launch(config) as c:
        await c.publish()  # the engines get the learner's weights
        for step in range(config.run.steps):
            groups = await c.generate(c.prompts(step))  # G completions of each prompt
            scored = await c.score(groups)  # the rewards of the task
            result = await c.learner.step(scored)  # one GRPO update
            await c.publish()
            print(f"step {step}  reward {scored.mean_reward:.3f}  loss {result.loss:+.4f}")


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1:]))  # e.g. run.steps=10 actors.count=2
