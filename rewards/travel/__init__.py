"""Trip planning as a task: a seeded world, queries with a known optimum, and rules that score."""
