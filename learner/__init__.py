"""The GRPO update under DeepSpeed ZeRO: from scored groups to new weights and checkpoints.

In the driver:

- `config`, `presets`: the sections `learner` and `algorithm`, and published algorithms as presets.
- `learner`: all ranks as one object: plan, step, publish, save, load.
- `plan`: what every rank does in a step, decided once, on sizes and rewards.
- `credit`, `advantages`: from rewards to advantages and the weights of tokens.
- `packing`, `shapes`: from completions to rows, and to the micro-batches of all ranks.
- `episodes`: from the turns of an episode to the branches of a row.
- `gang`: the processes of all ranks: started, watched, started again.
- `kept`: the copies of the ranks' state, and checkpoints written from them.
- `ranks`: typed calls to all rank actors. The cause of a failure is told from its consequences.
- `results`: from the sums of the ranks to the result of a step.

In every rank:

- `worker`, `spec`: the actor; what it is built from and what it answers.
- `setup`, `state`: process group, model, engine, reference; what is held between calls.
- `self_check`: whether the model is scored here as its own forward pass scores it.
- `optimizer`: DeepSpeed's configuration, AdamW, learning rate.
- `extensions`: DeepSpeed's compiled part.
- `step`: forward and backward passes, optimizer updates.
- `batch`: from a planned micro-batch to tensors.
- `logprobs`: the model as a scorer of tokens.
- `attention`, `flash`, `flex`: attention on CPUs, and by two sorts of kernels on GPUs.
- `norm`, `output_layer`: the model's norms, and its last layer, in little memory.
- `float8`: linear layers in float8.
- `lora`, `lora_config`: adapters beside frozen layers, merged into what is published.
- `reference`: the frozen policy of the KL term.
- `grpo`, `objectives`, `corrections`: the loss, its terms, weights for the mismatch.
- `publishing`, `weights`: from the policy's weights to a file in shared memory.
- `saving`, `reshape`: the rank's part of a checkpoint, also for other numbers of ranks.
- `safe_load`, `adapter_files`: reading a checkpoint without running code; adapters in PEFT's form.
- `keeping`, `copies`: a copy of the rank's state after each step.
- `behind`: a checkpoint's files from such a copy, while training goes on.

On every machine of a rank:

- `home`: owns the shared memory, which outlives the ranks.

On disk:

- `checkpoint`: complete or ignored.
- `aside`: files that are in the way are moved, never deleted.

Names of tensors end with their dimensions: N tokens of a batch, T tokens of completions, B rows, L
tokens of the longest row, P padded tokens, S completions, H hidden size, V vocabulary. logprobs_T
is a vector over completion tokens, hidden_TH a matrix.
"""
