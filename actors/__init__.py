"""Where completions are born: rollout actors around vLLM engines."""
