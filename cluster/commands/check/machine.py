"""The stage of resources: cores, GPUs, memory, disk; what the run needs, and what there is."""

from __future__ import annotations

import shutil

from cohort.actors.process import SHM
from cohort.cluster.commands.check.estimate import (
    Architecture,
    activation_bytes,
    kv_bytes_per_token,
    logit_bytes,
)
from cohort.cluster.commands.check.stages import Stage
from cohort.cluster.config import expand
from cohort.cluster.placement import (
    GIB,
    RANK_OVERHEAD,
    WIDTH,
    Resources,
    checkpoint_bytes,
    kept_bytes,
    learner_state,
    memory_needed,
    object_store_bytes,
    plan,
    published_bytes,
)
from cohort.cluster.prepare import Prepared
from cohort.learner.checkpoint import nearest_existing

# Why none is loaded: whether all weights are trained.
NO_REFERENCE = {True: "algorithm.kl_coef is 0", False: "the model without its adapters"}


def check_machine(
    prepared: Prepared,
    architecture: Architecture | None,
    have: Resources,
    here: bool,
    stage: Stage,
) -> None:
    """Compare what the run needs with what there is. here: it runs on this machine alone."""
    config = prepared.config
    where = "this machine" if here else f"the cluster at {config.cluster.address or '$RAY_ADDRESS'}"
    stage.say(
        f"{where}: {have.cpus:g} cores, {have.gpus:g} GPUs, {have.memory / GIB:.1f} GiB of memory"
        + (f" (limited to {have.limited})" if have.limited else "")
    )
    cuda = config.cluster.device == "cuda" or (config.cluster.device == "auto" and have.gpus > 0)
    step = None if architecture is None else _step_bytes(prepared, architecture)
    if cuda:
        _gpu_memory(prepared, step, stage)
    else:
        _host_memory(prepared, step, have, stage)
        _check_cache(prepared, architecture, stage)
    if here:
        _check_folders(prepared, have, stage)
    else:
        stage.say("shared memory and disks of the cluster's nodes cannot be seen from here")
    plan(config, have, prepared.parameters, prepared.trained)


def _step_bytes(prepared: Prepared, architecture: Architecture) -> int:
    """Activations and outputs of a rank's largest forward and backward pass, estimated."""
    config, longest = prepared.config, prepared.lengths.longest
    learner, task, completion = config.learner, config.task, config.actors.max_tokens
    groups = task.prompts_per_step // learner.workers
    tokens = min(
        max(learner.micro_batch_tokens, longest + completion),
        groups * (longest + task.group_size * completion),
    )
    width = WIDTH[config.model.precision]
    outputs = min(learner.logit_chunk_tokens, tokens)
    return activation_bytes(
        architecture, width, tokens, learner.gradient_checkpointing
    ) + logit_bytes(architecture, width, outputs)


def _host_memory(prepared: Prepared, step: int | None, have: Resources, stage: Stage) -> None:
    config = prepared.config
    need = memory_needed(config, prepared.parameters, prepared.trained)
    state = learner_state(config, prepared.parameters, prepared.trained)
    kinds = ", ".join(f"{kind} {size / GIB:.1f}" for kind, size in state.items())
    details = {
        "engines": f"{config.actors.count} x (weights twice, key-value cache "
        f"{config.actors.kv_cache_gib:g}, process)",
        "learner": f"{config.learner.workers} x ({kinds}, process {RANK_OVERHEAD / GIB:.1f}), "
        f"ZeRO {config.learner.zero_stage}",
        "reference": "for the KL" if need["reference"] else NO_REFERENCE[prepared.trained is None],
        "rewards": f"{config.rewards.workers} x process",
        "copies of the learner": "two in /dev/shm, weights to save; learner.keep_copy=false: none",
        "published weights": "two versions in /dev/shm",
    }
    if step is not None:
        need["activations"] = step * config.learner.workers
        details["activations"] = (
            f"{config.learner.workers} x the largest pass, learner.micro_batch_tokens="
            f"{config.learner.micro_batch_tokens}"
        )
    stage.say("memory needed, estimated in GiB:")
    for kind, size in need.items():
        stage.say(f"  {kind:<22}{size / GIB:6.1f}  {details[kind]}")
    total = sum(need.values())
    stage.say(f"  {'together':<18}{total / GIB:6.1f}  available {have.memory / GIB:.1f}")
    if total > have.memory and step is not None:
        stage.warn(
            f"memory may run out: about {total / GIB:.1f} GiB are needed with completions of full "
            f"length, {have.memory / GIB:.1f} are available; lower learner.micro_batch_tokens or "
            "set learner.gradient_checkpointing=true"
        )


def _check_cache(prepared: Prepared, architecture: Architecture | None, stage: Stage) -> None:
    """How many completions fit into an engine's key-value cache at once."""
    config, lengths = prepared.config, prepared.lengths
    if architecture is None:
        stage.say("key-value cache and activations: not estimated for this architecture")
        return
    token = kv_bytes_per_token(architecture, WIDTH[config.model.precision])
    room = int(config.actors.kv_cache_gib * GIB) // token
    group = config.task.group_size
    ahead = config.actors.max_staleness + 1
    groups = min(
        -(-config.task.prompts_per_step * ahead // config.actors.count),
        config.actors.max_concurrent // group,
    )
    wanted = groups * (lengths.longest + group * config.actors.max_tokens)
    stage.say(
        f"key-value cache: {token / 1024:.1f} KiB a token, so each engine has room for {room:,} "
        f"tokens; {groups * group} completions of full length at once need {wanted:,}"
    )
    if room < lengths.max_length:
        stage.problem(
            f"actors.kv_cache_gib={config.actors.kv_cache_gib:g} cannot hold one sequence of "
            f"{lengths.max_length:,} tokens: raise it to "
            f"{_round_up(lengths.max_length * token)} or lower model.max_length"
        )
    elif room < wanted:
        stage.warn(
            "the key-value cache cannot hold all completions at full length, so some would wait or "
            f"be computed again: actors.kv_cache_gib={_round_up(wanted * token)} holds them"
        )


def _round_up(size: int) -> float:
    """GiB, in steps of a quarter."""
    return -(-size * 4 // GIB) / 4


def _gpu_memory(prepared: Prepared, step: int | None, stage: Stage) -> None:
    """What one GPU of a rank and one of an engine need."""
    config, parameters = prepared.config, prepared.parameters
    state = learner_state(config, parameters, prepared.trained)
    if config.learner.offload != "none":
        state["optimizer"] = 0
    if config.learner.offload == "all":
        state["weights"] = 0
    needed = memory_needed(config, parameters, prepared.trained)
    reference = needed["reference"] // config.learner.workers
    parts = {**state, "reference": reference, "activations": step or 0}
    rank = sum(parts.values())
    kinds = ", ".join(f"{kind} {size / GIB:.1f}" for kind, size in parts.items())
    stage.say(f"GPU memory of a learner rank, estimated: {rank / GIB:.1f} GiB ({kinds})")
    engine = WIDTH[config.model.precision] * parameters // config.actors.tensor_parallel
    stage.say(
        f"GPU memory of an engine: weights {engine / GIB:.1f} GiB, the rest of "
        f"actors.gpu_memory={config.actors.gpu_memory:g} is key-value cache"
    )
    size = gpu_bytes()
    if size is None:
        stage.say("the GPUs' memory cannot be seen from this machine: compare it yourself")
        return
    stage.say(f"a GPU of this machine has {size / GIB:.1f} GiB")
    if rank > size:
        stage.warn(
            f"a learner rank may not fit: about {rank / GIB:.1f} GiB of {size / GIB:.1f}; raise "
            "learner.zero_stage or learner.workers, lower learner.micro_batch_tokens, or set "
            "learner.gradient_checkpointing=true or learner.offload"
        )
    if engine > size * config.actors.gpu_memory:
        stage.problem(
            f"an engine's weights ({engine / GIB:.1f} GiB) exceed actors.gpu_memory="
            f"{config.actors.gpu_memory:g} of {size / GIB:.1f} GiB: raise actors.tensor_parallel"
        )


def gpu_bytes() -> int | None:
    """Memory of this machine's first GPU; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    return int(torch.cuda.get_device_properties(0).total_memory)


def _check_folders(prepared: Prepared, have: Resources, stage: Stage) -> None:
    """Shared memory for the published weights, disk for the checkpoints."""
    config, parameters, trained = prepared.config, prepared.parameters, prepared.trained
    if have.shared_memory is not None:
        published = published_bytes(config, parameters)
        kept = kept_bytes(config, parameters, trained)
        stage.say(
            f"{SHM}: {have.shared_memory / GIB:.1f} GiB free, published weights take "
            f"{published / GIB:.1f}, copies of the learner {kept / GIB:.1f}, "
            f"Ray's objects up to {object_store_bytes(have) / GIB:.1f}"
        )
    folder = expand(config.run.dir).absolute()
    one = checkpoint_bytes(config, parameters, trained)
    # An old one goes after the new one is there.
    all_kept = (config.run.keep_checkpoints + 1) * one
    free = shutil.disk_usage(nearest_existing(folder)).free
    stage.say(
        f"disk of run.dir: {free / GIB:.1f} GiB free, checkpoints take {all_kept / GIB:.1f} "
        f"({config.run.keep_checkpoints} + 1 being written) of about {one / GIB:.1f}"
    )
    if one > free:
        stage.problem(
            f"run.dir={folder}: not one checkpoint ({one / GIB:.1f} GiB) fits on its disk "
            f"({free / GIB:.1f} GiB free): make room there or choose another run.dir"
        )
    elif all_kept > free:
        stage.warn(
            f"run.dir={folder}: {free / GIB:.1f} GiB are free, and checkpoints take up to "
            f"{all_kept / GIB:.1f}: make room or lower run.keep_checkpoints"
        )
