"""Environments: what answers the model's replies, so that a completion becomes an episode.

In the order in which data passes through: `specs` reads the config and the class's tools; `handle`
is a worker as actors call it; `worker` holds the episodes, `episode` one conversation with its
tokens and limits, `calls` finds tool calls in a reply; `process` is the worker's side of the child
process, `host` that process, `loading` what it plays: a class with `step` (`base`) or with tools
(`tools`). `scores` turns what was given into rewards.
"""
