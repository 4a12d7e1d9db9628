"""Trip planning as a task: a seeded world, queries with a known optimum, and rules that score.

In the order in which data passes through them:

- `places`, `world`: real countries and cities, and what can be booked there.
- `query`, `generate`: what a customer asks for, and queries of five levels.
- `solver`: the cheapest plan of a query.
- `prompt`: a query in words.
- `task`: the task that makes rows of them.
- `demonstrations`: plans to learn from before reinforcement.
- `agency`: the task as a conversation with tools.
- `plan`, `booking`: an answer, parsed, and with its names looked up.
- `rules`, `scores`: whether a plan is valid, and what it is worth.
- `reward`: the reward function.
"""
