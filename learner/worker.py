"""One rank of the learner: a model under DeepSpeed ZeRO that carries out planned steps."""

from __future__ import annotations

import functools
import json
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from cohort.actors.process import redirect_output, stacks_if_late, start_reaper
from cohort.actors.records import ScoredGroup, WeightsInfo
from cohort.learner.attention import RowShape, Tree
from cohort.learner.batch import BatchTensors, build_micro_batch
from cohort.learner.checkpoint import HF_FOLDER, CheckpointError
from cohort.learner.grpo import LossStats, kl_in_reward, policy_loss
from cohort.learner.plan import MicroBatch
from cohort.learner.safe_load import only_data
from cohort.learner.saved import PatientEngine, require_finite, try_to_write, write_model
from cohort.learner.spec import LearnerSpec, ModelFacts, RankResult, UpdateResult
from cohort.learner.weights import WeightFiles

LEARNER_FILE = "learner.json"
DEEPSPEED_FOLDER = "deepspeed"
DEEPSPEED_TAG = "state"


@dataclass
class _Memo:
    """Log-probs that updates on the same micro-batches share, by the micro-batch's place."""

    old: dict[int, Any] = field(default_factory=dict)
    reference: dict[int, Any] = field(default_factory=dict)


P = ParamSpec("P")
R = TypeVar("R")


def _watched(
    method: Callable[Concatenate[LearnerWorker, P], R],
) -> Callable[Concatenate[LearnerWorker, P], R]:
    """A call that all ranks carry out together: when it is late, each rank's log shows where."""

    @functools.wraps(method)
    def call(self: LearnerWorker, *args: P.args, **kwargs: P.kwargs) -> R:
        with stacks_if_late(self.spec.learner.step_timeout_s):
            return method(self, *args, **kwargs)

    return call


class LearnerWorker:
    """One rank. A plain class, to be made a Ray actor by `cohort.learner.learner`.

    All ranks enter every method from `setup` on together.
    """

    def __init__(self, spec: LearnerSpec) -> None:
        # DeepSpeed reads these when it is first imported.
        os.environ["DS_ACCELERATOR"] = spec.device
        os.environ["RANK"] = str(spec.rank)
        os.environ["WORLD_SIZE"] = str(spec.world_size)
        os.environ["LOCAL_RANK"] = "0"  # Ray shows an actor only its own devices.
        if spec.log_dir is not None:
            redirect_output(Path(spec.log_dir) / f"learner-{spec.rank}.log")
        # Only rank 0 writes there, but every rank leaves files of its libraries when it is killed.
        start_reaper(*([Path(spec.shm_dir)] if spec.rank == 0 else []))
        self.spec = spec
        self.steps_done = 0
        self.updates_done = 0
        self.reference: Any = None
        self._files = WeightFiles(spec.shm_dir)
        self._timeout = timedelta(seconds=spec.learner.step_timeout_s)
        self._store: Any = None

    def rendezvous(self) -> tuple[str, int]:
        """Rank 0: listen for the other ranks on a free port; returns (address, port)."""
        import ray
        import torch.distributed as dist

        address = ray.util.get_node_ip_address() if ray.is_initialized() else "127.0.0.1"
        # Port 0: the system picks one and it stays ours, unlike one found free and then given up.
        self._store = dist.TCPStore(
            "0.0.0.0", 0, self.spec.world_size, True, self._timeout, wait_for_workers=False
        )
        return address, self._store.port

    def setup(self, address: str, port: int, timeout_s: float) -> ModelFacts:
        """Join the other ranks at rank 0's address, load the model, build the DeepSpeed engine.

        timeout_s: how long the caller waits.

        Raises UnsupportedModel when the learner cannot score this architecture correctly.
        """
        with stacks_if_late(timeout_s):
            return self._set_up(address, port)

    def _set_up(self, address: str, port: int) -> ModelFacts:
        import torch
        import torch.distributed as dist

        spec = self.spec
        torch.set_num_threads(spec.threads)
        torch.manual_seed(spec.seed + spec.rank)
        os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = address, str(port)
        self.device = torch.device("cpu")
        if spec.device == "cuda":
            self.device = torch.device("cuda", 0)
            torch.cuda.set_device(self.device)
        store = self._store or dist.TCPStore(address, port, spec.world_size, False, self._timeout)
        dist.init_process_group(
            "nccl" if spec.device == "cuda" else "gloo",
            store=store,
            rank=spec.rank,
            world_size=spec.world_size,
            timeout=self._timeout,
        )
        self.policy = self._load_policy(spec.learner.gradient_checkpointing)
        parameters = sum(p.numel() for p in self.policy.parameters())
        self.model = self.policy.model
        self.policy.self_check(spec.temperature)
        if spec.trial_dir is not None:
            try_to_write(self.model, self.model_folder, Path(spec.trial_dir), spec.rank)
        if spec.learner.float8 != "off":
            from cohort.learner.float8 import convert

            convert(self.model, spec.learner.float8, self.device)
        self.engine = self._deepspeed_engine()
        if spec.algorithm.kl_coef > 0:
            from cohort.learner.reference import ReferencePolicy

            original = self._load_policy(gradient_checkpointing=False)
            self.reference = ReferencePolicy(original, spec.learner.zero_stage, spec.dtype)
        return self._facts(parameters)

    def _load_policy(self, gradient_checkpointing: bool) -> Any:
        import torch
        from transformers import AutoModelForCausalLM

        from cohort.learner.logprobs import PolicyModel
        from cohort.learner.weights import check_names

        self.model_folder = _resolve(self.spec.model_path)
        dtype = {
            "bfloat16": torch.bfloat16,
            "float16": torch.float16,
            "float32": torch.float32,
        }[self.spec.dtype]
        model = AutoModelForCausalLM.from_pretrained(self.model_folder, dtype=dtype)
        check_names(model)
        attention = self.spec.learner.attention
        return PolicyModel(model, attention, gradient_checkpointing).to(self.device)

    def _deepspeed_engine(self) -> Any:
        import deepspeed
        from deepspeed.utils import logger

        from cohort.learner import extensions
        from cohort.learner.optimizer import client_optimizer, deepspeed_config

        logger.setLevel("ERROR")
        spec = self.spec
        extensions.load(spec.device)
        deepspeed.init_distributed(
            "nccl" if spec.device == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False
        )
        engine, *_ = deepspeed.initialize(
            model=self.policy,
            optimizer=client_optimizer(self.policy.parameters(), spec.learner, spec.dtype),
            config=deepspeed_config(spec.learner, spec.dtype),
            dist_init_required=False,
        )
        if spec.world_size == 1 and spec.learner.zero_stage == 0:
            # Nobody to reduce with; DeepSpeed would still flatten, convert and copy all gradients.
            engine.enable_backward_allreduce = False
        return engine

    def _facts(self, parameters: int) -> ModelFacts:
        config = self.model.config.get_text_config()
        body = parameters - config.vocab_size * config.hidden_size
        # Multiply-adds: one per parameter; two products of the hidden size per layer and token
        # attended to. Softmax and mask are bound by memory and triple the time of the products.
        attention = 3 * 2 * config.num_hidden_layers * config.hidden_size
        return ModelFacts(
            parameters=parameters,
            attention_work=attention / max(body, 1),
            masked_attention=not (self.policy.can_tree and self.spec.device == "cpu"),
            shares_prompts=self.policy.shares_prompts,
        )

    @_watched
    def step(self, updates: Sequence[Sequence[MicroBatch]], groups: Sequence[Any]) -> RankResult:
        """Carry out this rank's part of a planned step.

        updates: the micro-batches of each optimizer update; all ranks have equally many. groups:
        the ScoredGroups of their rows, or Ray references to them. An update moves the optimizer
        unless the global gradient norm is not finite; then nothing changes, on any rank, and its
        `applied` is False. Nothing is done, on any rank, when one cannot have its groups.
        """
        started = time.monotonic()
        fetched, lost = self._fetch(groups)
        if not self._everywhere(not lost):
            elapsed = time.monotonic() - started
            return RankResult(self.spec.rank, (), self.steps_done, elapsed, tuple(lost))
        by_id = {group.group.id: group for group in fetched}
        # The same on all ranks, whatever their rows: they must make the same forward passes.
        same = self.spec.algorithm.update_on == "all"
        memos = [_Memo()] * len(updates) if same else [_Memo() for _ in updates]
        if self.spec.algorithm.anchor == "learner" and not same:
            # Before anything moves: what later updates see for the first time.
            for batches, memo in zip(updates[1:], memos[1:], strict=True):
                memo.old = {i: self._score(batch, by_id) for i, batch in enumerate(batches)}
        results = tuple(
            self._update(batches, by_id, memo) for batches, memo in zip(updates, memos, strict=True)
        )
        if any(result.applied for result in results):
            self.steps_done += 1
            refresh = self.spec.algorithm.refreshes_reference(self.steps_done)
            if self.reference is not None and refresh:
                self.reference.become(self.model)
        return RankResult(self.spec.rank, results, self.steps_done, time.monotonic() - started)

    def _update(
        self, batches: Sequence[MicroBatch], by_id: dict[str, ScoredGroup], memo: _Memo
    ) -> UpdateResult:
        from cohort.learner.optimizer import lr_at

        spec = self.spec
        total = spec.total_steps * spec.algorithm.updates_per_step
        learning_rate = lr_at(self.updates_done + 1, spec.learner, total)
        for param_group in self.engine.optimizer.param_groups:
            param_group["lr"] = learning_rate
        while True:
            loss_scale = self._loss_scale()
            stats = LossStats()
            for place, batch in enumerate(batches):
                stats += self._accumulate(batch, by_id, memo, place)
            self.engine.step()
            applied = self.engine.was_step_applied()
            # DeepSpeed halved the scale: the same update again, so that no batch is lost to it.
            finite = math.isfinite(stats.loss)
            if applied or self._loss_scale() == loss_scale or not self._everywhere(finite):
                break
        self.updates_done += applied
        norm = float(self.engine.get_global_grad_norm())
        return UpdateResult(stats, applied, norm, learning_rate, loss_scale)

    def _loss_scale(self) -> float:
        """The factor on the loss that keeps small float16 gradients from vanishing."""
        if self.spec.dtype != "float16":
            return 1.0
        return float(self.engine.optimizer.loss_scaler.loss_scale)

    def _everywhere(self, holds: bool) -> bool:
        """Whether something holds on every rank; all of them ask together."""
        import torch
        import torch.distributed as dist

        if self.spec.world_size == 1:
            return holds
        said = torch.tensor(float(holds), device=self.device)
        dist.all_reduce(said, dist.ReduceOp.MIN)
        return bool(said)

    def _fetch(self, groups: Sequence[Any]) -> tuple[list[ScoredGroup], list[int]]:
        """The groups behind references; and the places of those whose objects are gone."""
        import ray
        from ray.exceptions import GetTimeoutError, RayError

        timeout_s = self.spec.learner.step_timeout_s
        fetched, lost = [], []
        # Together first: one after the other they would cross the network one by one.
        refs = [group for group in groups if isinstance(group, ray.ObjectRef)]
        if refs:
            ray.wait(refs, num_returns=len(refs), timeout=timeout_s)
        for place, group in enumerate(groups):
            try:
                is_ref = isinstance(group, ray.ObjectRef)
                fetched.append(ray.get(group, timeout=timeout_s) if is_ref else group)
            except GetTimeoutError:
                raise
            except RayError:
                lost.append(place)
        return fetched, lost

    def _policy(self, tensors: BatchTensors, chunks: int) -> Any:
        return self.engine(
            tensors.input_ids_N,
            tensors.position_ids_N,
            tensors.tree,
            tensors.predict_T,
            tensors.target_T,
            self.spec.temperature,
            chunks,
        )

    def _score(self, batch: MicroBatch, by_id: dict[str, ScoredGroup]) -> Any:
        """The policy's log-probs of a micro-batch as it is now, [T] without gradient."""
        import torch

        with torch.no_grad():
            tensors = build_micro_batch(batch, by_id).to(self.device)
            return self._policy(tensors, batch.chunks)[0]

    def _accumulate(
        self, batch: MicroBatch, by_id: dict[str, ScoredGroup], memo: _Memo, place: int
    ) -> LossStats:
        """Forward and backward over one micro-batch; gradients add up in the engine."""
        spec = self.spec
        tensors = build_micro_batch(batch, by_id).to(self.device)
        reference_T = memo.reference.get(place)
        if reference_T is None and self.reference is not None and spec.algorithm.kl_in == "loss":
            reference_T = self.reference.logprobs(tensors, spec.temperature, batch.chunks)
        logprobs_T, entropy_T = self._policy(tensors, batch.chunks)
        loss, stats = policy_loss(
            logprobs_T,
            tensors.behaviour_T,
            tensors.advantage_T,
            tensors.weight_T,
            tensors.sequence_T,
            spec.algorithm,
            entropy_T=entropy_T,
            old_T=memo.old.get(place),
            reference_T=reference_T,
        )
        memo.old.setdefault(place, logprobs_T.detach())
        if reference_T is not None:
            memo.reference[place] = reference_T
        if not loss.isfinite():
            # Clamps can stop a nan on its way back. It must reach the gradients: their global norm
            # is what all ranks look at to agree on leaving the step out.
            loss = loss * float("nan")
        # The loss is this rank's share of a sum over ranks, DeepSpeed averages over them. This is
        # the only scaling: the weights of the tokens hold every normaliser.
        self.engine.backward(loss * self.spec.world_size, scale_wrt_gas=False)
        return stats

    @_watched
    def reference_kl(
        self, batches: Sequence[MicroBatch], groups: Sequence[Any]
    ) -> dict[str, float] | tuple[int, ...]:
        """k1 of engine against reference, summed over each completion of these micro-batches.

        Where a rank cannot have its groups: the places of those that are gone, and nothing is done.
        """
        fetched, lost = self._fetch(groups)
        if not self._everywhere(not lost):
            return tuple(lost)
        by_id = {group.group.id: group for group in fetched}
        found = {}
        for batch in batches:
            tensors = build_micro_batch(batch, by_id).to(self.device)
            reference_T = self.reference.logprobs(tensors, self.spec.temperature, batch.chunks)
            pieces = [piece for row in batch.rows for piece in row.pieces]
            sizes = [piece.tokens for piece in pieces]
            if not pieces:
                continue
            for piece, behaviour, reference in zip(
                pieces, tensors.behaviour_T.split(sizes), reference_T.split(sizes), strict=True
            ):
                found[piece.completion_id] = kl_in_reward(behaviour, reference)
        return found

    def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probs of tokens 1..n-1 of a sequence, float32, at temperature 1.

        Raises ValueError for fewer than two tokens.
        """
        import torch

        n = len(token_ids)
        if n < 2:
            raise ValueError(f"a sequence of {n} tokens has no log-probs")
        ids = torch.tensor(token_ids, device=self.device)
        position = torch.arange(n, device=self.device)
        chunks = -(-(n - 1) // self.spec.learner.logit_chunk_tokens)
        with torch.no_grad():
            logprobs, _ = self.engine(
                ids, position, Tree((RowShape(n),)), position[:-1], ids[1:], 1.0, chunks
            )
        return logprobs.tolist()

    @_watched
    def publish(self, version: int, keep: Sequence[int], remote: bool) -> WeightsInfo | None:
        """Rank 0 writes the weights into shared memory and returns where; others return None.

        keep: older versions whose files stay; others must have no readers any more, for their
        memory is used again. remote: also put the bytes into Ray's object store,
        for engines on other nodes.
        """
        from cohort.learner.weights import gather_named_weights, weight_specs

        stage = self.spec.learner.zero_stage
        tensors = gather_named_weights(self.model, stage)
        if self.spec.rank != 0:
            for _ in tensors:
                pass
            return None
        specs = weight_specs(self.model, stage)
        fingerprint, nbytes = self._files.publish(version, keep, specs, tensors)
        path = self._files.path(version)
        return WeightsInfo(
            version=version,
            names=tuple(spec.name for spec in specs),
            fingerprint=fingerprint,
            nbytes=nbytes,
            path=str(path),
            node_id=_node_id(),
            remote=_put(path) if remote else None,
        )

    @_watched
    def save(self, folder: str) -> None:
        """Write this rank's optimizer state; rank 0 also writes the Hugging Face folder.

        Raises CheckpointError, on every rank, when any could not write or the weights are not
        finite.
        """
        import torch.distributed as dist

        target = Path(folder)
        require_finite(self.model, self.device)
        with PatientEngine(self.engine) as writing:
            try:
                self.engine.save_checkpoint(
                    str(target / DEEPSPEED_FOLDER),
                    tag=DEEPSPEED_TAG,
                    client_state={"steps_done": self.steps_done, "updates_done": self.updates_done},
                    save_latest=False,
                )
            except OSError as error:
                # A script that DeepSpeed copies beside its files; the others wait at the end.
                writing.error = writing.error or error
                dist.barrier()
        state = self._whole_state()
        if self.spec.rank == 0:
            with writing.kept():
                write_model(self.model, state, self.model_folder, target / HF_FOLDER)
        if self.reference is not None and self.reference.refreshed:
            with writing.kept():
                self.reference.save(target, write=self.spec.rank == 0)
        if self.spec.rank == 0:
            facts = {"steps_done": self.steps_done, **_must_match(self.spec)}
            if self.reference is not None:
                facts["reference"] = self.reference.fingerprint
            with writing.kept():
                text = json.dumps(facts, indent=1)
                (target / LEARNER_FILE).write_text(text, encoding="utf-8")
        writing.agree(self.device)

    @_watched
    def export(self, folder: str) -> None:
        """Rank 0 writes the policy as a Hugging Face folder, with tokenizer and chat template."""
        self._export(Path(folder))

    def _export(self, target: Path) -> None:
        state = self._whole_state()
        if self.spec.rank == 0:
            write_model(self.model, state, self.model_folder, target)

    def _whole_state(self) -> dict[str, Any]:
        """Rank 0: a copy of all weights in main memory, tied ones sharing theirs."""
        from cohort.learner.weights import gather_named_weights

        state: dict[str, Any] = {}
        copies: dict[int, Any] = {}
        named = self.model.state_dict(keep_vars=True)
        for name, tensor in gather_named_weights(self.model, self.spec.learner.zero_stage):
            if self.spec.rank == 0:
                identity = id(named[name])
                if identity not in copies:
                    copies[identity] = tensor.to("cpu", copy=True)
                state[name] = copies[identity]
        return state

    @_watched
    def load(self, folder: str) -> int:
        """Restore weights, optimizer state and step count; returns the optimizer steps done.

        Raises CheckpointError, before anything is loaded, when the checkpoint was written by a
        learner of another shape.
        """
        source = Path(folder)
        check_loadable(source, self.spec)
        if self.reference is not None:
            known = json.loads((source / LEARNER_FILE).read_text(encoding="utf-8")).get("reference")
            if known not in (None, self.reference.fingerprint):
                raise CheckpointError(
                    f"{source} holds on to another reference than the model at {self.model_folder}:"
                    " set model.path to the model that the run started from"
                )
            self.reference.load(source)
        with only_data(source):
            path, client_state = self.engine.load_checkpoint(
                str(source / DEEPSPEED_FOLDER), tag=DEEPSPEED_TAG, load_lr_scheduler_states=False
            )
        if path is None:
            raise CheckpointError(f"DeepSpeed found nothing to load in {source}")
        self.steps_done = int(client_state["steps_done"])
        self.updates_done = int(client_state["updates_done"])
        return self.steps_done

    def memory(self) -> dict[str, int]:
        """Peak memory of this rank's process in bytes, and of its device where it has one."""
        import torch

        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        memory = {"peak_rss_bytes": peak}
        if self.spec.device == "cuda":
            memory["peak_device_bytes"] = torch.cuda.max_memory_allocated(self.device)
        return memory


def _shape(workers: int, zero_stage: int, dtype: str) -> dict[str, Any]:
    """What the learner that loads a checkpoint has in common with the one that wrote it."""
    return {
        "learner.workers": workers,
        "learner.zero_stage": zero_stage,
        "model.dtype": dtype,
    }


def _must_match(spec: LearnerSpec) -> dict[str, Any]:
    return _shape(spec.world_size, spec.learner.zero_stage, spec.dtype)


def check_loadable(checkpoint: Path, spec: LearnerSpec) -> None:
    """Raise CheckpointError unless a learner of this spec can load the checkpoint."""
    check_shape(checkpoint, spec.world_size, spec.learner.zero_stage, spec.dtype)


def check_shape(checkpoint: Path, workers: int, zero_stage: int, dtype: str) -> None:
    """Raise CheckpointError unless a learner of this shape can load the checkpoint."""
    file = checkpoint / LEARNER_FILE
    if not file.is_file():
        raise CheckpointError(f"{checkpoint} holds no learner state ({LEARNER_FILE} is missing)")
    found = json.loads(file.read_text(encoding="utf-8"))
    for key, wanted in _shape(workers, zero_stage, dtype).items():
        if found[key] != wanted:
            raise CheckpointError(
                f"{checkpoint} was written with {key}={found[key]}, this run has {key}={wanted}: "
                f"resume with {key}={found[key]}, or start a new run from {checkpoint / HF_FOLDER}"
            )


def _resolve(model_path: str) -> Path:
    """The model's folder on this machine."""
    path = Path(os.path.expandvars(model_path)).expanduser()
    if path.is_dir():
        return path
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(model_path))


def _node_id() -> str:
    import ray

    return ray.get_runtime_context().get_node_id() if ray.is_initialized() else "local"


def _put(path: Path) -> Any:
    import numpy as np
    import ray

    return ray.put(np.fromfile(path, dtype=np.uint8))
