"""One rank of the learner: the actor that carries out planned steps."""

from __future__ import annotations

import functools
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

from cohort.actors.process import redirect_output, running_ray, stacks_if_late, start_reaper
from cohort.actors.records import GroupRef, WeightsInfo
from cohort.learner import behind, copies, keeping, publishing, saving, setup, step
from cohort.learner.attention import Tree
from cohort.learner.copies import Copies
from cohort.learner.home import Whereabouts, here
from cohort.learner.logprobs import ModelInputs
from cohort.learner.packing import MicroBatch
from cohort.learner.shapes import RowShape
from cohort.learner.spec import LearnerSpec, ModelFacts, RankResult
from cohort.learner.state import RankState, everywhere
from cohort.learner.weights import WeightFiles

if TYPE_CHECKING:
    import torch.distributed as dist

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
    """One rank. A plain class, which `cohort.learner.learner` makes a Ray actor.

    All ranks enter every method from `setup` on together.
    """

    state: RankState

    def __init__(self, spec: LearnerSpec) -> None:
        # DeepSpeed reads these when it is first imported.
        os.environ["DS_ACCELERATOR"] = spec.device
        os.environ["RANK"] = str(spec.rank)
        os.environ["WORLD_SIZE"] = str(spec.world_size)
        os.environ["LOCAL_RANK"] = "0"  # Ray shows an actor only its own devices.
        if spec.log_dir is not None:
            redirect_output(Path(spec.log_dir) / f"learner-{spec.rank}.log")
        # Its libraries leave files when it is killed. What is in shm_dir outlives it.
        start_reaper()
        self.spec = spec
        self._files = WeightFiles(spec.shm_dir)
        self._copies = Copies(Path(spec.shm_dir) / copies.FOLDER, spec.rank)
        self._store: dist.TCPStore | None = None

    def whereabouts(self) -> Whereabouts:
        """The process and the machine that this rank is."""
        ray = running_ray()
        return here("local" if ray is None else ray.get_runtime_context().get_node_id())

    def pulse(self) -> bool:
        """Answers from a thread of its own, also while the rank computes."""
        return True

    def rendezvous(self) -> tuple[str, int]:
        """Rank 0: listen for the other ranks on a free port; returns (address, port)."""
        ray = running_ray()
        address = "127.0.0.1" if ray is None else ray.util.get_node_ip_address()
        self._store = setup.open_store(self.spec)
        return address, self._store.port

    def setup(self, address: str, port: int, timeout_s: float) -> ModelFacts:
        """Join the other ranks at rank 0's address, load the model, build the DeepSpeed engine.

        Args:
            address: Where rank 0 listens.
            port: As `rendezvous` returned it.
            timeout_s: How long the caller waits.

        Raises:
            UnsupportedModel: The learner cannot score this architecture correctly.
            CheckpointError: A trial of saving the model failed.
        """
        with stacks_if_late(timeout_s):
            self.state, facts = setup.set_up(self.spec, self._store, address, port)
        return facts

    @_watched
    def step(
        self, updates: Sequence[Sequence[MicroBatch]], groups: Sequence[GroupRef]
    ) -> RankResult:
        """Carry out this rank's part of a planned step; see `cohort.learner.step.train_step`.

        Args:
            updates: The micro-batches of each optimizer update; all ranks have equally many.
            groups: The groups of their rows. Nothing is done, on any rank, when one of the ranks
                cannot get its groups.
        """
        started = time.monotonic()
        state = self.state
        by_id, lost = step.fetch(groups, self.spec.learner.step_timeout_s)
        complete = everywhere(not lost, state.device)
        results = step.train_step(state, updates, by_id) if complete else ()
        elapsed = time.monotonic() - started
        return RankResult(self.spec.rank, results, state.steps_done, elapsed, lost)

    @_watched
    def reference_kl(
        self, batches: Sequence[MicroBatch], groups: Sequence[GroupRef]
    ) -> dict[str, float] | tuple[int, ...]:
        """k1 of engine against reference, summed over each completion of these micro-batches.

        Returns:
            KL in nats by completion id. Where a rank cannot get its groups nothing is done, and
            every rank returns the indices of those that it lacks.
        """
        by_id, lost = step.fetch(groups, self.spec.learner.step_timeout_s)
        if not everywhere(not lost, self.state.device):
            return lost
        return step.reference_kl(self.state, batches, by_id)

    def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probs of tokens 1..n-1 of a sequence, float32, at temperature 1.

        Raises:
            ValueError: There are fewer than two tokens.
        """
        import torch

        n = len(token_ids)
        if n < 2:
            raise ValueError(f"a sequence of {n} tokens has no log-probs")
        ids = torch.tensor(token_ids, device=self.state.device)
        position = torch.arange(n, device=self.state.device)
        inputs = ModelInputs(ids, position, Tree((RowShape(n),)), position[:-1], ids[1:])
        chunks = -(-(n - 1) // self.spec.learner.logit_chunk_tokens)
        with torch.no_grad():
            logprobs, _ = self.state.engine(inputs, 1.0, chunks)
        return logprobs.tolist()

    @_watched
    def publish(self, version: int, keep: Sequence[int], remote: bool) -> WeightsInfo | None:
        """Rank 0 publishes the weights and returns where; see `cohort.learner.publishing`."""
        return publishing.publish(self.state, self._files, version, keep, remote)

    @_watched
    def save(self, folder: str) -> None:
        """Write this rank's optimizer state; rank 0 also writes the Hugging Face folder.

        Raises:
            CheckpointError: On every rank, when any could not write or the weights are not finite.
        """
        saving.save(self.state, Path(folder))

    @_watched
    def export(self, folder: str) -> None:
        """Rank 0 writes the policy as a Hugging Face folder, with tokenizer and chat template."""
        saving.export(self.state, Path(folder))

    @_watched
    def load(self, folder: str) -> int:
        """Restore weights, optimizer state and counts; returns the optimizer steps done.

        Raises:
            CheckpointError: Before anything is loaded, when the checkpoint was written by a
                learner of another shape.
        """
        return saving.load(self.state, Path(folder))

    @_watched
    def keep(self, generation: int, first_on_machine: bool) -> None:
        """Copy this rank's state into shared memory; see `cohort.learner.keeping`."""
        keeping.keep(self.state, self._copies, generation, first_on_machine)

    @_watched
    def prepare_save(self) -> None:
        """Leave beside the copies what else a checkpoint has; see `cohort.learner.behind`."""
        behind.prepare(self.state, self._copies)

    @_watched
    def restore(self, generation: int) -> int:
        """Take the state of a copy; returns the optimizer steps done."""
        return keeping.restore(self.state, self._copies, generation)

    def memory(self) -> dict[str, int]:
        """Peak memory of this rank's process in bytes, and of its device where it has one."""
        import torch

        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        memory = {"peak_rss_bytes": peak}
        if self.spec.device == "cuda":
            memory["peak_device_bytes"] = torch.cuda.max_memory_allocated(self.state.device)
        return memory
