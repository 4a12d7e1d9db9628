"""A learner rank without DeepSpeed: LearnerWorker's interface on the policy of `policy.py`.

The product's Learner drives it, so plans, checks, versions and checkpoints are the real ones.
Weights are published through the product's WeightFiles. Its optimizer has momentum: a resumed run
that forgot it would not be bit-identical.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import ActorDiedError, ObjectLostError

from cohort.actors.records import ScoredGroup, WeightsInfo
from cohort.actors.weight_file import TensorSpec
from cohort.learner.behind import BESIDE
from cohort.learner.checkpoint import (
    LEARNER_FILE,
    CheckpointError,
    check_loadable,
    must_match,
    shape_of,
)
from cohort.learner.copies import FOLDER, Copies, MemoryWriter, look_at
from cohort.learner.grpo import LossStats
from cohort.learner.home import Whereabouts
from cohort.learner.packing import MicroBatch
from cohort.learner.spec import LearnerSpec, ModelFacts, RankResult, UpdateResult
from cohort.learner.weights import WeightFiles
from tests.harness import policy
from tests.harness.local_ray import Ref, current_actor, current_ray

LOAD_S = 5.0
STEP_S = 2.0
SAVE_S = 1.0
PREPARE_S = 0.1
WRITE_S = 1.0
PUBLISH_S = 0.1
KEEP_S = 0.1
MOMENTUM = 0.5
KINDS = ("momentum", "weights")


class Gang:
    """What the ranks of one learner add up together; a dead rank breaks it, as with gloo."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._parts: dict[int, Any] = {}
        self._sum: asyncio.Future[Any] | None = None

    async def sum(self, rank: int, part: Any) -> Any:
        """The sum over all ranks, in their order."""
        if self._sum is None:
            self._sum = asyncio.get_running_loop().create_future()
        total = self._sum
        self._parts[rank] = part
        if len(self._parts) == self.size:
            parts = [self._parts[r] for r in sorted(self._parts)]
            self._parts, self._sum = {}, None
            total.set_result([sum(column[1:], column[0]) for column in zip(*parts, strict=True)])
        return await total


def write_state(
    target: Path,
    rank: int,
    momentum: policy.Weights,
    weights: policy.Weights,
    steps: int,
    updates: int,
) -> None:
    """A rank's part of a checkpoint."""
    (target / "deepspeed").mkdir(exist_ok=True)
    state = {f"momentum.{name}": array for name, array in momentum.items()}
    state |= {f"weights.{name}": array for name, array in weights.items()}
    np.savez(target / "deepspeed" / f"rank-{rank}.npz", steps=steps, updates=updates, **state)


class LocalLearnerHome:
    """The owner of a machine's shared memory; the ranks' pids are their numbers in LocalRay."""

    kind = "home"

    def __init__(self, folder: str, writes: bool) -> None:
        self.folder, self.writes = folder, writes

    async def write(self, rank: int, generation: int, target: str) -> None:
        assert self.writes
        ray, actor = current_ray(), current_actor()
        copies = Copies(Path(self.folder) / FOLDER, rank)
        copies.require(generation)
        # The memory itself: who writes into it changes what is written to the disk.
        state: Any = look_at(copies.place(generation) / f"state-{rank}.pt")
        ray.emit("write", actor.name, target)
        await asyncio.sleep(WRITE_S * ray.slowness(actor.name))
        arrays = [{n: t.numpy() for n, t in state[kind].items()} for kind in KINDS]
        write_state(Path(target), rank, *arrays, *state["counts"])
        if rank == 0:
            beside = copies.folder / BESIDE
            shutil.copytree(beside, target, dirs_exist_ok=True)
            shutil.rmtree(beside)
        ray.emit("written", actor.name, target)

    def cpu_seconds(self, pid: int) -> float:
        actor = current_ray().actors[pid]
        busy = actor.death is None and actor.thawed.is_set()
        return asyncio.get_running_loop().time() if busy else 0.0

    def end(self, ranks: list[Whereabouts]) -> None:
        for rank in ranks:
            actor = current_ray().actors[rank.pid]
            if actor.death is None:
                actor.end(ActorDiedError(), restart=False)


class LocalLearnerWorker:
    """One rank."""

    serial = True
    kind = "learner"

    def __init__(self, spec: LearnerSpec) -> None:
        self.spec = spec
        self.name = f"learner-{spec.rank}"
        self.steps_done = 0
        self.updates_done = 0
        self._files = WeightFiles(spec.shm_dir)
        self._copies = Copies(Path(spec.shm_dir) / FOLDER, spec.rank)

    def whereabouts(self) -> Whereabouts:
        actor = current_actor()
        return Whereabouts(actor.node, current_ray().actors.index(actor), 0.0)

    @ray.method(concurrency_group="watch")
    async def pulse(self) -> bool:
        # Slow where a test says that something holds the interpreter's lock for so long.
        await asyncio.sleep(current_ray().slowness(f"{self.name} pulse") - 1)
        return True

    def rendezvous(self) -> tuple[str, int]:
        return "127.0.0.1", next(current_ray().numbers)

    async def setup(self, address: str, port: int, timeout_s: float) -> ModelFacts:  # noqa: ARG002
        from transformers import AutoTokenizer

        await asyncio.sleep(LOAD_S)
        if self.spec.trial_dir is not None and not Path(self.spec.trial_dir).is_dir():
            raise CheckpointError(f"{self.spec.trial_dir}: nothing can be tried there")
        ray = current_ray()
        ray.emit("setup", current_actor().name)
        self._gang = ray.gangs.setdefault(port, Gang(self.spec.world_size))
        self.model_folder = Path(self.spec.model_path)
        tokenizer = AutoTokenizer.from_pretrained(self.model_folder)
        self.weights = policy.initial(len(tokenizer))
        self.momentum = {name: np.zeros_like(array) for name, array in self.weights.items()}
        return ModelFacts(
            parameters=sum(array.size for array in self.weights.values()),
            attention_work=1e-3,
            masked_attention=True,
            shares_prompts=True,
        )

    async def step(
        self, updates: Sequence[Sequence[MicroBatch]], groups: Sequence[Any]
    ) -> RankResult:
        ray, actor = current_ray(), current_actor()
        fetched: list[ScoredGroup] = []
        lost = []
        for place, group in enumerate(groups):
            try:
                fetched.append(await group if isinstance(group, Ref) else group)
            except ObjectLostError:
                lost.append(place)
        if (await self._gang.sum(self.spec.rank, [np.array([len(lost)])]))[0].any():
            return RankResult(self.spec.rank, (), self.steps_done, 0.0, tuple(lost))
        by_id = {group.group.id: group for group in fetched}
        event = ray.emit(
            "step",
            actor.name,
            number=self.steps_done,
            completions=[
                segment.completion_id
                for batches in updates
                for batch in batches
                for segment in batch.segments
            ],
            groups=fetched,
        )
        await asyncio.sleep(STEP_S * ray.slowness(actor.name))
        results = tuple(
            [await self._update(batches, by_id, event.reply == "nonfinite") for batches in updates]
        )
        self.steps_done += any(result.applied for result in results)
        return RankResult(self.spec.rank, results, self.steps_done, STEP_S)

    async def _update(
        self, batches: Sequence[MicroBatch], by_id: dict[str, ScoredGroup], nonfinite: bool
    ) -> UpdateResult:
        total = {name: np.zeros_like(array) for name, array in self.weights.items()}
        stats = LossStats()
        for batch in batches:
            for row in batch.rows:
                group = by_id[row.group_id].group
                by_name = {completion.id: completion for completion in group.completions}
                prompt = group.prompt.token_ids
                for segment in row.segments:
                    turns = policy.parts(prompt, by_name[segment.completion_id])
                    advantages = segment.turn_advantages or (segment.advantage,) * len(turns)
                    for advantage, turn in zip(advantages, turns, strict=True):
                        stats += self._train(total, turn, advantage * segment.weight)
        summed = await self._gang.sum(self.spec.rank, [total["embed"], total["head"]])
        gradients = dict(zip(("embed", "head"), summed, strict=True))
        norm = float(np.sqrt(sum(float(g @ g) for g in gradients.values())))
        learning_rate = self.spec.learner.learning_rate
        if nonfinite:
            return UpdateResult(stats, False, float("nan"), learning_rate)
        for name, slope in gradients.items():
            self.momentum[name] = MOMENTUM * self.momentum[name] + slope
            rate = np.float32(learning_rate * policy.LEARNING_SCALE)
            self.weights[name] = self.weights[name] + rate * self.momentum[name]
        self.updates_done += 1
        return UpdateResult(stats, True, norm, learning_rate)

    def _train(
        self,
        total: policy.Weights,
        turn: tuple[list[int], np.ndarray, np.ndarray],
        factor: float,
    ) -> LossStats:
        """Add the gradients of one turn's tokens."""
        context, tokens, logprobs = turn
        at = policy.state(self.weights, context)
        ours = policy.distribution(self.weights, at, self.spec.temperature)
        ratio = ours[tokens] - logprobs
        found = policy.gradient(self.weights, context, tokens, self.spec.temperature)
        for name, slope in found.items():
            total[name] += np.float32(factor) * slope
        return LossStats(
            loss=-factor * float(np.exp(ratio).sum()),
            tokens=len(tokens),
            k3=float((np.exp(ratio) - 1 - ratio).sum()),
            engine_ratio=float(np.exp(ratio).sum()),
            log_ratio_abs_max=float(np.abs(ratio).max()),
        )

    async def reference_kl(
        self,
        batches: Sequence[MicroBatch],
        groups: Sequence[Any],  # noqa: ARG002
    ) -> dict[str, float]:
        return {
            segment.completion_id: 0.01 * segment.tokens
            for batch in batches
            for segment in batch.segments
        }

    def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        return policy.score(self.weights, token_ids)

    async def publish(self, version: int, keep: Sequence[int], remote: bool) -> WeightsInfo | None:
        ray, actor = current_ray(), current_actor()
        if self.spec.rank != 0:
            return None
        await asyncio.sleep(PUBLISH_S)
        ray.emit("publish", actor.name, version=version)
        tensors = policy.as_tensors(self.weights)
        specs = [TensorSpec(n, tuple(t.shape), t.dtype) for n, t in tensors.items()]
        fingerprint, nbytes = self._files.publish(version, keep, specs, tensors.items())
        path = self._files.path(version)
        return WeightsInfo(
            version=version,
            names=tuple(tensors),
            fingerprint=fingerprint,
            nbytes=nbytes,
            path=str(path),
            node_id=actor.node,
            remote=ray.put(np.fromfile(path, dtype=np.uint8)) if remote else None,
        )

    async def save(self, folder: str) -> None:
        ray, actor = current_ray(), current_actor()
        ray.emit("save", actor.name, folder)
        await asyncio.sleep(SAVE_S)
        write_state(
            Path(folder), self.spec.rank, self.momentum, self.weights, self.steps_done,
            self.updates_done,
        )  # fmt: skip
        await self._write_rest(Path(folder))

    async def prepare_save(self) -> None:
        current_ray().emit("save", current_actor().name)
        await asyncio.sleep(PREPARE_S)
        beside = self._copies.folder / BESIDE
        beside.mkdir(parents=True, exist_ok=True)
        await self._write_rest(beside)

    async def _write_rest(self, target: Path) -> None:
        if self.spec.rank != 0:
            return
        await self.export(str(target / "hf"))
        counts = {"steps_done": self.steps_done, "updates_done": self.updates_done}
        facts = {**counts, **must_match(self.spec)}
        (target / LEARNER_FILE).write_text(json.dumps(facts))

    async def export(self, folder: str) -> None:
        if self.spec.rank != 0:
            return
        from safetensors.numpy import save_file

        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        save_file(self.weights, target / "model.safetensors")
        for file in self.model_folder.iterdir():
            if file.is_file() and file.suffix != ".safetensors":
                shutil.copy(file, target)

    async def load(self, folder: str) -> int:
        source = Path(folder)
        check_loadable(source, self.spec)
        await asyncio.sleep(LOAD_S)
        # All ranks hold the same; those of another number of ranks, too.
        ranks, _ = shape_of(source)
        with np.load(source / "deepspeed" / f"rank-{self.spec.rank % ranks}.npz") as saved:
            self.weights = {n: saved[f"weights.{n}"] for n in self.weights}
            self.momentum = {n: saved[f"momentum.{n}"] for n in self.momentum}
            self.steps_done, self.updates_done = int(saved["steps"]), int(saved["updates"])
        return self.steps_done

    async def keep(self, generation: int, first_on_machine: bool) -> None:  # noqa: ARG002
        ray, actor = current_ray(), current_actor()
        with self._copies.writing(generation) as writer:
            place = self._copies.place(generation)
            place.mkdir(parents=True, exist_ok=True)
            state = {
                "momentum": {n: torch.from_numpy(a) for n, a in self.momentum.items()},
                "weights": {n: torch.from_numpy(a) for n, a in self.weights.items()},
                "counts": (self.steps_done, self.updates_done),
            }
            writer.save(state, str(place / f"state-{self.spec.rank}.pt"))
            # Between the bytes and the marker that makes them count.
            ray.emit("keep", actor.name, generation=generation)
            await asyncio.sleep(KEEP_S)

    async def restore(self, generation: int) -> int:
        self._copies.require(generation)
        await asyncio.sleep(KEEP_S)
        file = self._copies.place(generation) / f"state-{self.spec.rank}.pt"
        state: Any = MemoryWriter({}).load(str(file))
        self.weights = {n: t.numpy() for n, t in state["weights"].items()}
        self.momentum = {n: t.numpy() for n, t in state["momentum"].items()}
        self.steps_done, self.updates_done = state["counts"]
        return self.steps_done

    def memory(self) -> dict[str, int]:
        return {"peak_rss_bytes": 1 << 30}
