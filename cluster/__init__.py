"""Composes a run of the other three packages. In the order in which data passes through:

- `cli`, `commands/`: the words of a command line become one of train, check, eval, warmup, submit.
- `config`, `values`: keys with types and defaults; a file and overrides become a `Config`.
- `prepare`, `model_folder`, `weight_files`, `lengths`: what is looked at before anything starts.
- `run_dir`, `continuing`, `changes`, `fingerprint`: who owns a run directory, and whether what it
  holds may be continued.
- `placement`, `ray_start`, `making`, `launch`: machines, Ray, and the actors, started and ended.
- `stream`: prompts in, scored groups out, oldest step first.
- `loop`, `run`, `publishing`, `failures`: THE training loop, and what it is made of.
- `recording`, `observe/`: metrics, completions, terminal, W&B, the report.
- `saving`, `signals`, `waiting`: checkpoints when they are due and before any end.
- `session`: the same parts for a loop of your own (`cohort.launch`).
"""
