"""The GRPO update under DeepSpeed ZeRO: from scored groups to new weights and checkpoints.

In the driver:

    config, presets   the sections `learner` and `algorithm`, and published algorithms as presets
    learner           all ranks as one object: plan, step, publish, save, load
    plan              what every rank does in a step, decided once, on sizes and rewards
    credit            rewards -> advantages (on `advantages`), weights of tokens
    packing, shapes   completions -> rows -> micro-batches of all ranks
    episodes          the turns of an episode -> branches of a row
    gang              the processes of all ranks: started, watched, started again
    kept              the copies of the ranks' state, and checkpoints written from them
    ranks             typed calls to all rank actors, failures told from their consequences
    results           the sums of the ranks -> the result of a step

In every rank:

    worker            the actor; spec: what it is built from and what it answers
    setup, state      process group, model, engine, reference; what is held between calls
    optimizer         DeepSpeed's configuration, AdamW, learning rate
    extensions        DeepSpeed's compiled part
    step              forward and backward passes, optimizer updates
    batch             planned micro-batch -> tensors
    logprobs          the model as a scorer of tokens, on attention, norm and output_layer
    float8            linear layers in float8
    lora, lora_config adapters beside frozen layers, merged into what is published
    reference         the frozen policy of the KL term
    grpo              the loss, on objectives and corrections
    publishing        weights -> shared memory, on weights
    saving            the rank's part of a checkpoint, on safe_load, reshape and adapter_files
    keeping           a copy of the rank's state after each step, on copies
    behind            a checkpoint's files from such a copy, while training goes on

On every machine of a rank:

    home              owns the shared memory, which outlives the ranks

On disk:

    checkpoint        complete or ignored; aside: what is in the way is moved, never deleted

Names of tensors end with their dimensions: N tokens of a batch, T tokens of completions, B rows, L
tokens of the longest row, P padded tokens, S completions, H hidden size, V vocabulary. logprobs_T
is a vector over completion tokens, hidden_TH a matrix.
"""
