"""`cohort check`: what can go wrong with a run, found before anything expensive starts.

- `run`: the stages in their order
- `stages`: what a stage prints, and what is concluded
- `model`, `prompts`, `machine`, `rewards`, `environment`, `rollout`: the stages themselves
- `estimate`: their arithmetic
"""
