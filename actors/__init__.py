"""Generation: rollout actors around vLLM engines, and what every package shares.

In the order in which data passes through them:

- `records`: prompts, completions, groups, scored groups, failures. Everything else speaks of these.
- `pool`, `dispatch`: groups that are asked for, sent to the actor with the most room; lost ones are
  generated again, dead actors replaced.
- `slot`, `handle`: one actor as the pool sees it, whether it still makes progress, and typed calls.
- `rollout`, `engine`: the Ray actor, and the only file that imports vLLM.
- `sampling`, `float8`: what is put into vLLM on CPUs.
- `text`: from token ids to the text that rewards read.
- `weight_file`, `shared_memory`: how the learner's weights reach an engine.
- `served`, `proof`, `probe`: how an engine proves that it holds them.
- `config`: the section `actors`. `errors`: `CohortError`, and whose fault an error is. `machine`:
  cores and memory within cgroups. `process`: logs of processes, and nothing left behind.
"""
