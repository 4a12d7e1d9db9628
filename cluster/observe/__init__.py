"""What is recorded and shown of a run, in the order in which a step passes through it.

- `metrics`: from what happened in a step to the numbers that describe it
- `stats`: means and quantiles of values some of which may be missing
- `rollouts`: every completion with its scores, and the actor that writes them
- `metrics_file`: the keys of a row, metrics.jsonl
- `wandb_run`: the same on Weights & Biases
- `tracking`: the three of them as one
- `console`: what a person sees while the run goes on
- `report/`: the page of a run, afterwards
"""
