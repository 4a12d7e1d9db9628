"""How completions are judged: reward functions, reward actors, tasks."""
