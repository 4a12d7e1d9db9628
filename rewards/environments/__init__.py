"""Environments: what answers the model's replies, so that a completion becomes an episode.

In the order in which data passes through them:

- `specs`: the config, and the tools of the class.
- `handle`: a worker as actors call it.
- `worker`: the actor that holds the episodes.
- `episode`, `calls`: one conversation with its tokens and limits; tool calls in a reply.
- `agent_episode`, `histories`: an episode of an agent, and which turn its request continues.
- `chat_server`, `chat`: the endpoint at which agents ask the model, and OpenAI's form of it.
- `process`, `frames`: the worker's side of the child process, and what lies between the two.
- `host`: that process.
- `loading`: what it plays, found by its path.
- `base`, `tools`: a class with `step`, an agent, or a class whose methods are tools.
- `sandbox_tools`, `adapters/`: the sandbox as tools; environments of other packages.
- `scores`: from what environments gave to rewards.
"""
