"""Setting a rank up: the process group, the policy, DeepSpeed's engine, the reference."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from cohort.actors.machine import split_cores
from cohort.learner.flex import FLEX_MULTIPLE
from cohort.learner.logprobs import PolicyModel
from cohort.learner.saving import try_to_write
from cohort.learner.self_check import check_adapters, compile_if_it_works, self_check
from cohort.learner.shapes import LENGTH_MULTIPLE
from cohort.learner.spec import LearnerSpec, ModelFacts
from cohort.learner.state import Engine, RankState


def open_store(spec: LearnerSpec) -> dist.TCPStore:
    """Rank 0: listen for the other ranks on a free port."""
    # Port 0: the system picks one and it stays ours, unlike one found free and then given up.
    return dist.TCPStore(
        "0.0.0.0", 0, spec.world_size, True, _timeout(spec), wait_for_workers=False
    )


def set_up(
    spec: LearnerSpec, store: dist.TCPStore | None, address: str, port: int
) -> tuple[RankState, ModelFacts]:
    """Join the other ranks, load the model, build the DeepSpeed engine.

    Args:
        spec: Of this rank.
        store: Rank 0's own, see `open_store`; None on the others.
        address: Where rank 0 listens.
        port: The port of rank 0's store.

    Raises:
        UnsupportedModel: The learner cannot score this architecture correctly.
        CheckpointError: A trial of saving the model failed.
    """
    device = _join(spec, store, address, port)
    folder = resolve(spec.model_path)
    start = None if spec.init_from is None else Path(spec.init_from)
    weights = folder if start is None or spec.lora is not None else start
    policy = load_policy(spec, weights, device, spec.learner.gradient_checkpointing)
    parameters = sum(p.numel() for p in policy.parameters())
    self_check(policy, spec.temperature)
    if spec.trial_dir is not None:
        try_to_write(policy.model, folder, Path(spec.trial_dir), spec.rank)
    if spec.learner.float8 != "off":
        from cohort.learner.float8 import convert

        convert(policy.model, spec.learner.float8, device)
    base = None if spec.lora is None else _put_adapters(spec, policy, start)
    if spec.learner.compiles(spec.device):
        compile_if_it_works(policy, spec.temperature, spec.learner.compile == "on")
    state = RankState(spec, device, folder, policy, _deepspeed_engine(spec, policy), base=base)
    if spec.algorithm.kl_coef > 0 and base is not None:
        from cohort.learner.reference import AdapterReference

        stage = spec.learner.zero_stage
        state.reference = AdapterReference(state.model, state.engine, stage, base)
    elif spec.algorithm.kl_coef > 0:
        from cohort.learner.reference import ReferencePolicy

        original = load_policy(spec, folder, device, gradient_checkpointing=False)
        original.use_what_works_for(policy)
        if spec.learner.compiles(spec.device):
            compile_if_it_works(original, spec.temperature, spec.learner.compile == "on")
        state.reference = ReferencePolicy(original, spec.learner.zero_stage, spec.dtype)
    return state, _facts(policy, device, parameters)


def _join(spec: LearnerSpec, store: dist.TCPStore | None, address: str, port: int) -> torch.device:
    """Make the process group of all ranks; returns this rank's device."""
    if spec.cores:
        # Before there are threads that compute: they inherit it.
        os.sched_setaffinity(0, split_cores(spec.cores, spec.world_size)[spec.rank])
    torch.set_num_threads(spec.threads)
    torch.manual_seed(spec.seed + spec.rank)
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address, str(port)
    device = torch.device("cpu")
    if spec.device == "cuda":
        device = torch.device("cuda", 0)
        torch.cuda.set_device(device)
    dist.init_process_group(
        _backend(spec),
        store=store or dist.TCPStore(address, port, spec.world_size, False, _timeout(spec)),
        rank=spec.rank,
        world_size=spec.world_size,
        timeout=_timeout(spec),
        # NCCL connects the ranks now, where a fault is seen at once, and not in the first step.
        device_id=device if spec.device == "cuda" else None,
    )
    return device


def _backend(spec: LearnerSpec) -> str:
    return "nccl" if spec.device == "cuda" else "gloo"


def _timeout(spec: LearnerSpec) -> timedelta:
    return timedelta(seconds=spec.learner.step_timeout_s)


def load_policy(
    spec: LearnerSpec, folder: Path, device: torch.device, gradient_checkpointing: bool
) -> PolicyModel:
    """The model of a Hugging Face folder, whole, in the precision of the spec."""
    from transformers import AutoModelForCausalLM

    from cohort.learner.weights import check_names

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, spec.dtype))
    check_names(model)
    return PolicyModel(model, spec.learner.attention, gradient_checkpointing).to(device)


def _put_adapters(spec: LearnerSpec, policy: PolicyModel, start: Path | None) -> str:
    """Freeze the policy and give it adapters; returns a digest of what is frozen.

    start: a folder with the adapter to begin with; None: with one that changes nothing.
    """
    from cohort.learner.adapter_files import check_adapter, load_adapter
    from cohort.learner.lora import adapter_shapes, add_adapters
    from cohort.learner.weights import digest_of

    assert spec.lora is not None
    base, shapes = digest_of(policy.model), adapter_shapes(policy.model, spec.lora)
    add_adapters(policy, spec.lora, spec.seed)
    if start is not None:
        check_adapter(start, spec.lora, shapes)
        load_adapter(policy.model, start, spec.dtype, base)
    check_adapters(policy, spec.temperature)
    return base


def _deepspeed_engine(spec: LearnerSpec, policy: PolicyModel) -> Engine:
    import deepspeed
    from deepspeed.utils import logger

    from cohort.learner import extensions
    from cohort.learner.optimizer import client_optimizer, deepspeed_config

    logger.setLevel("ERROR")
    extensions.load(spec.device)
    deepspeed.init_distributed(_backend(spec), auto_mpi_discovery=False, verbose=False)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=policy,
        optimizer=client_optimizer(trained, spec.learner, spec.dtype),
        config=deepspeed_config(spec.learner, spec.dtype, spec.device),
        dist_init_required=False,
    )
    if spec.world_size == 1 and spec.learner.zero_stage == 0:
        # Nobody to reduce with; DeepSpeed would still flatten, convert and copy all gradients.
        engine.enable_backward_allreduce = False
    return engine


def _facts(policy: PolicyModel, device: torch.device, parameters: int) -> ModelFacts:
    config = policy.model.config.get_text_config()
    body = parameters - config.vocab_size * config.hidden_size
    # Multiply-adds: one per parameter; two products of the hidden size per layer and token
    # attended to. Softmax and mask are bound by memory and triple the time of the products.
    kernel = policy.kernel(device)
    attention = 3 * 2 * config.num_hidden_layers * config.hidden_size
    return ModelFacts(
        parameters=parameters,
        attention_work=attention / max(body, 1),
        masked_attention=kernel == "masked",
        length_multiple=FLEX_MULTIPLE if kernel in ("flash", "flex") else LENGTH_MULTIPLE,
        shares_prompts=policy.shares_prompts,
    )


def resolve(model_path: str) -> Path:
    """The model's folder on this machine; downloaded when it is the name of a model on the hub."""
    path = Path(os.path.expandvars(model_path)).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model_path))
