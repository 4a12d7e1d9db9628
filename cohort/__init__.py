"""Cohort: GRPO for language models on Ray, vLLM and DeepSpeed."""
