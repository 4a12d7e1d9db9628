"""Composes a run of the other three packages. In the order in which data passes through:

- `cli`, `commands/`: the words of a command line, and what each command does.
- `supervise`: the parent of `cohort train --supervise`, which starts a lost driver again.
- `config`, `values`, `config_file`: keys with types and defaults; a file and overrides become a
  `Config`.
- `contradictions`: keys that do not fit each other.
- `prepare`, `lengths`: what is loaded and looked at before anything starts.
- `model_folder`, `weight_files`, `adapter_folder`: the checks of the model and of an adapter.
- `run_dir`, `continuing`, `fingerprint`: who owns a run directory, and whether what it holds may be
  continued.
- `placement`, `cores`: which machines and cores each actor gets.
- `ray_start`, `ray_watch`: Ray, joined or started, and whether it is still there.
- `launch`: the actors, started and ended.
- `run`, `loop`: what a run is made of, and THE training loop.
- `requests`, `stream`: prompts in, scored groups out, oldest step first.
- `failures`, `first_errors`: how much may fail, and the first error of every kind.
- `journal/`: groups on the disk before they are trained.
- `publishing`: the learner's weights, given to the engines.
- `observe/`: metrics, completions, terminal, W&B, the report.
- `evaluation`: how well the policy does on held-out prompts.
- `scaling`, `sizing`: other numbers of actors and workers, asked for and carried out.
- `saving`, `signals`, `waiting`: checkpoints, the end that a signal asks for, long waits.
- `session`: the same parts for a loop of your own (`cohort.launch`).
- `files`, `errors`: atomic writes; the error of a run that cannot start.
"""
