"""The commands of `cohort` that take more than a few lines, in the order in which one uses them.

- `check/`: `cohort check`: what can go wrong with a run, before it starts.
- `warmup`, `demonstrations`: `cohort warmup`, and the demonstrations that it trains on.
- `train`: `cohort train`.
- `submit`: `cohort submit`: a config on a Ray cluster elsewhere.
- `evaluate`: `cohort eval`.
- `replay`: `cohort replay`: steps of a run, trained again.
"""
