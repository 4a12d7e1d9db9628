"""How the policy moves: the GRPO update under DeepSpeed ZeRO, weights, checkpoints."""
