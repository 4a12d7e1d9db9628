"""What a critic would cost: this learner's memory with and without a policy-sized value model.

    .venv/bin/python benchmarks/critic_memory.py [--ranks 2] [--stages 0 1 2 3] [--out FOLDER]

Two learner ranks train SmolLM2-135M for two steps under each ZeRO stage. "With a critic" means the
same ranks also train, under a DeepSpeed engine of the same settings, the same architecture with a
scalar head on a squared error, as PPO does. Measured on every rank after the second step: the bytes
of all tensors that are alive (weights, gradients, master weights, moments) and the peak resident
memory of the process. Takes about five minutes.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quickstart import ROOT, save

from cohort.actors.records import Completion, Group, GroupMeta, Prompt, ScoredGroup, ScoreMeta
from cohort.learner.batch import build_micro_batch
from cohort.learner.config import AlgorithmConfig, LearnerConfig
from cohort.learner.logprobs import ModelInputs
from cohort.learner.packing import MicroBatch, Packer
from cohort.learner.plan import plan_step
from cohort.learner.setup import load_policy
from cohort.learner.spec import LearnerSpec, ModelFacts
from cohort.learner.worker import LearnerWorker

MODEL = Path.home() / ".cache" / "cohort" / "models" / "SmolLM2-135M-Instruct"
MIB = 2**20


class Critic(torch.nn.Module):
    """The policy's architecture with one number as its output."""

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy = policy
        weights = next(policy.parameters())
        size = policy.model.config.hidden_size
        self.head = torch.nn.Linear(size, 1, bias=False, dtype=weights.dtype, device=weights.device)

    def forward(self, inputs: ModelInputs) -> torch.Tensor:
        """Values [T] of the states that predict token t."""
        return self.head(self.policy.hidden(inputs))[:, 0].float()


class MeasuredWorker(LearnerWorker):
    """A learner rank that can train a critic beside the policy, and weighs itself."""

    critic: Any = None

    def add_critic(self) -> None:
        """Build the value model and its own DeepSpeed engine."""
        import deepspeed

        from cohort.learner.optimizer import client_optimizer, deepspeed_config

        state = self.state
        policy = load_policy(
            self.spec, state.model_folder, state.device, self.spec.learner.gradient_checkpointing
        )
        critic = Critic(policy)
        self.critic, *_ = deepspeed.initialize(
            model=critic,
            optimizer=client_optimizer(critic.parameters(), self.spec.learner, self.spec.dtype),
            config=deepspeed_config(self.spec.learner, self.spec.dtype),
            dist_init_required=False,
        )

    def train(self, batches: list[MicroBatch], groups: list[ScoredGroup]) -> dict[str, float]:
        """One step of the policy, and one of the critic where there is one; what is held then."""
        self.step([batches], groups)
        if self.critic is not None:
            by_id = {group.group.id: group for group in groups}
            for batch in batches:
                tensors = build_micro_batch(batch, by_id)
                values = self.critic(tensors)
                loss = (tensors.weight_T * (values - tensors.advantage_T).square()).sum()
                self.critic.backward(loss * self.spec.world_size, scale_wrt_gas=False)
            self.critic.step()
        gc.collect()
        return {
            "state_mib": live_bytes() / MIB,
            "peak_rss_mib": self.memory()["peak_rss_bytes"] / MIB,
        }


def live_bytes() -> int:
    """Bytes of all tensor storages that Python can reach; each storage once."""
    storages = {}
    for item in gc.get_objects():
        # The exact types: what a compiler traced with has no memory.
        if type(item) in (torch.Tensor, torch.nn.Parameter) and item.layout == torch.strided:
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def sample_groups(
    count: int = 4, prompt_tokens: int = 40, tokens: int = 32, vocabulary: int = 40_000
) -> list[ScoredGroup]:
    """Groups of eight completions of random tokens, half of them rewarded."""
    random = np.random.default_rng(0)
    groups = []
    for name in map(str, range(count)):
        ids = random.integers(0, vocabulary, prompt_tokens)
        prompt = Prompt(name, tuple(int(t) for t in ids), "")
        completions = tuple(
            Completion(
                f"{name}/{i}", name, random.integers(0, vocabulary, tokens),
                np.full(tokens, -10.0, dtype=np.float32), "stop", 0, (0, 0), "",
            )
            for i in range(8)
        )  # fmt: skip
        groups.append(ScoredGroup(Group(name, prompt, completions), {}, (0.0, 1.0) * 4))
    return groups


def metas(group: ScoredGroup) -> tuple[GroupMeta, ScoreMeta]:
    """Sizes and rewards, as the planner wants them."""
    completions = group.group.completions
    ids, lengths = tuple(c.id for c in completions), tuple(len(c.token_ids) for c in completions)
    meta = GroupMeta(
        group.group.id, len(group.group.prompt.token_ids), ids, lengths, (False,) * len(ids),
        (0, 0), "", 0.0,
    )  # fmt: skip
    return meta, ScoreMeta(group.group.id, group.totals, {}, (), 0.0)


def measure(stage: int, ranks: int, critic: bool) -> list[dict[str, float]]:
    """What each rank holds."""
    import ray

    from cohort.cluster.placement import cpu_environment

    groups = sample_groups()
    learner = LearnerConfig(workers=ranks, zero_stage=stage)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as shm:
        spec = LearnerSpec(
            model_path=str(MODEL), dtype="bfloat16", learner=learner, algorithm=AlgorithmConfig(),
            temperature=1.0, max_tokens=32, rank=0, world_size=ranks, device="cpu", threads=1,
            seed=0, shm_dir=str(Path(shm) / "weights"),
        )  # fmt: skip
        # glibc's own settings: a heap that keeps everything would hide what is given back.
        environment = {k: v for k, v in cpu_environment(1).items() if k != "GLIBC_TUNABLES"}
        actor = ray.remote(num_cpus=0.5, runtime_env={"env_vars": environment})(MeasuredWorker)
        workers = [actor.remote(replace(spec, rank=rank)) for rank in range(ranks)]
        address = ray.get(workers[0].rendezvous.remote())
        facts: list[ModelFacts] = ray.get([w.setup.remote(*address, 600) for w in workers])
        if critic:
            ray.get([w.add_critic.remote() for w in workers])
        plan = plan_step(
            [metas(group) for group in groups],
            AlgorithmConfig(),
            Packer(ranks, 2048, share_prompts=facts[0].shares_prompts),
            max_tokens=32,
        )
        for _ in range(2):
            found = ray.get(
                [
                    worker.train.remote(list(shard), groups)
                    for worker, shard in zip(workers, plan.updates[0], strict=True)
                ]
            )
        for worker in workers:
            ray.kill(worker)
    return found


def table(results: list[dict[str, Any]]) -> str:
    """The largest rank of every setting, and what the critic adds."""
    lines = [
        "| ZeRO | state, MiB a rank | with critic | saved | peak RSS, MiB | with critic | saved |",
        "|---|---|---|---|---|---|---|",
    ]
    for stage in dict.fromkeys(result["stage"] for result in results):
        cells = []
        for key in ("state_mib", "peak_rss_mib"):
            alone, both = (
                max(
                    rank[key]
                    for result in results
                    if (result["stage"], result["critic"]) == (stage, critic)
                    for rank in result["ranks"]
                )
                for critic in (False, True)
            )
            cells += [f"{alone:.0f}", f"{both:.0f}", f"{1 - alone / both:.0%}"]
        lines.append(f"| {stage} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    import ray

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "benchmark-critic")
    options = parser.parse_args()
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    results = []
    for stage in options.stages:
        for critic in (False, True):
            print(f"ZeRO {stage}, {'with' if critic else 'no'} critic ...", flush=True)
            ranks = measure(stage, options.ranks, critic)
            results.append({"stage": stage, "critic": critic, "ranks": ranks})
    ray.shutdown()
    save(options.out, table(results), results=results)


if __name__ == "__main__":
    main()
