"""The mutants. `old` occurs exactly once in its file: who changes such a line changes it here."""

from __future__ import annotations

from tests.mutants.runner import Mutant

LOOP = "tests/harness/test_loop.py"
RESUME = "tests/harness/test_resume.py"
CHAOS = "tests/harness/test_chaos.py"
DURABLE = "tests/harness/test_durable.py"

MUTANTS = (
    Mutant(
        "actors/engine.py",
        "if not await self._answer(self._llm.reset_prefix_cache(reset_running_requests=True)):",
        "if not True:",
        "prompts are never read from a cache that older weights filled",
        (f"{LOOP}::test_the_prefix_cache_is_reset_at_every_update",),
    ),
    Mutant(
        "cluster/loop.py",
        "last = min(run.step + config.actors.max_staleness, config.run.steps - 1)",
        "last = min(run.step + config.actors.max_staleness + 1, config.run.steps - 1)",
        "no completion is older than actors.max_staleness",
        (f"{LOOP}::test_completions_are_as_old_as_allowed_and_never_older",),
    ),
    Mutant(
        "cluster/loop.py",
        "run.step, cursor = run.step + 1, batch.cursor",
        "run.step, cursor = run.step + 1, run.stream.cursor",
        "a checkpoint holds its own step's place in the data, not the stream's",
        (f"{RESUME}::test_every_checkpoint_of_an_overlapped_run_holds_its_own_steps_cursor",),
    ),
    Mutant(
        "cluster/loop.py",
        "        gap = await publish(run)\n",
        "        gap = 0.0\n",
        "every step's weights are published before the next generation",
        (f"{LOOP}::test_every_step_generates_with_the_weights_of_the_step_before",),
    ),
    Mutant(
        "actors/rollout.py",
        "if info.version < self._version:",
        "if False:",
        "an actor refuses weights older than its own",
        (f"{LOOP}::test_an_actor_refuses_weights_older_than_its_own",),
    ),
    Mutant(
        "cluster/stream.py",
        'seed=derive_seed(config.run.seed, "rollout", step, prompt.id),',
        'seed=derive_seed(config.run.seed, "rollout", prompt.id),',
        "a group's seed is its own in every step",
        (f"{LOOP}::test_a_groups_seed_is_its_own_in_every_step_and_for_every_prompt",),
    ),
    Mutant(
        "learner/checkpoint.py",
        "        for path in files:\n            _sync(path)\n",
        "",
        "a checkpoint's files are on the disk before it is complete",
        (f"{DURABLE}::test_every_file_and_folder_is_written_through_before_the_marker",),
    ),
)
