"""Generation: rollout actors around vLLM engines, and what every package shares.

What every package uses:

- `records`, `turns`: prompts, completions, groups, scored groups, failures; the turns of episodes.
  Everything else speaks of these.
- `errors`: `CohortError`, and what caused an error that comes from another process.
- `plain`: the type of values whose fields are known only when they are read.
- `machine`: cores and memory within cgroups.
- `process`: logs of processes, and the removal of what they leave behind.
- `watch`, `witness`: whether something has stopped, and looks at processes from outside.

In the order in which data passes through them:

- `config`: the section `actors`.
- `admission`: how far generation may run ahead of training.
- `pool`, `dispatch`: groups that are asked for, sent to the actor with the most room. Lost groups
  are generated again.
- `fleet`, `demand`: the actors, started, replaced and retired; how many of them a run wants.
- `slot`, `handle`: one actor as the pool sees it, and typed calls to it.
- `rollout`, `play`: the Ray actor, and the turns of an episode in its engine.
- `engine`: the only file that imports vLLM.
- `sampling`, `float8`: what is put into vLLM on CPUs.
- `spans`, `text`: which weights a token came from; from token ids to the text that rewards read.
- `weight_file`, `shared_memory`: how the learner's weights reach an engine.
- `served`, `proof`, `probe`: how an engine proves that it holds them.
"""
