"""What is recorded and shown of a run: metrics, completions, terminal, W&B, report."""
