"""TRL's half of the comparison. Runs in TRL's own environment, which `against_trl.py` makes.

python trl_side.py step SETTINGS.json RESULT.json
python trl_side.py loss TENSORS.pt RESULT.pt
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer


def variety(completions: list[str], **_: Any) -> list[float]:
    """The reward of both sides: how many different characters a completion has."""
    return [float(len(set(text))) for text in completions]


def config(folder: str, **options: Any) -> GRPOConfig:
    """What both uses share: CPU, no reference, one update per batch, nothing logged elsewhere."""
    return GRPOConfig(
        output_dir=folder,
        use_cpu=True,
        use_vllm=False,
        beta=0.0,
        num_iterations=1,
        gradient_accumulation_steps=1,
        gradient_checkpointing=False,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        scale_rewards="group",
        learning_rate=1e-6,
        lr_scheduler_type="constant",
        warmup_steps=0,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        shuffle_dataset=False,
        seed=0,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        log_completions=False,
        disable_tqdm=True,
        **options,
    )


class Timer(TrainerCallback):
    """Seconds from the beginning of each optimizer step to its end, generation included."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began = time.monotonic()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.monotonic() - self.began)


def step(settings: dict[str, Any]) -> dict[str, Any]:
    """Train a few steps; seconds of each, of its generation, and the lengths generated."""
    variant = {
        "float32": {"bf16": False},
        "bfloat16": {"bf16": False, "model_init_kwargs": {"dtype": "bfloat16"}},
        "autocast": {"bf16": True},
    }[settings["variant"]]
    timer = Timer()
    size, length = settings["group_size"], settings["completion_tokens"]
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=settings["model"],
            args=config(
                folder,
                per_device_train_batch_size=len(settings["prompts"]) * size,
                num_generations=size,
                max_completion_length=length,
                # Exactly this many tokens, as on the other side.
                generation_kwargs={"min_new_tokens": length},
                loss_type="dapo",
                max_steps=settings["steps"],
                **variant,
            ),
            reward_funcs=variety,
            train_dataset=Dataset.from_dict({"prompt": settings["prompts"] * settings["steps"]}),
            callbacks=[timer],
        )
        generating: list[float] = []
        generate = trainer._generate_single_turn

        def timed(*arguments: Any, **keywords: Any) -> Any:
            began = time.monotonic()
            result = generate(*arguments, **keywords)
            generating.append(time.monotonic() - began)
            return result

        trainer._generate_single_turn = timed
        trainer.train()
        logs = [row for row in trainer.state.log_history if "completions/mean_length" in row]
    return {
        "step_s": timer.seconds,
        "generate_s": generating,
        "mean_length": [row["completions/mean_length"] for row in logs],
        "reward": [row["reward"] for row in logs],
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "dtype": str(next(trainer.model.parameters()).dtype),
    }


def losses(given: dict[str, Any]) -> dict[str, Any]:
    """TRL's loss and its gradients for ready-made tensors, per loss type."""
    inputs = given["inputs"]
    found = {}
    for loss_type in given["loss_types"]:
        with tempfile.TemporaryDirectory() as folder:
            trainer = GRPOTrainer(
                model=given["model"],
                args=config(
                    folder,
                    bf16=False,
                    model_init_kwargs={"dtype": "float32"},
                    per_device_train_batch_size=len(inputs["prompt_ids"]),
                    num_generations=given["group_size"],
                    max_completion_length=given["max_tokens"],
                    epsilon=0.2,
                    epsilon_high=0.28,
                    loss_type=loss_type,
                    max_steps=1,
                ),
                reward_funcs=variety,
                train_dataset=Dataset.from_dict({"prompt": ["a"] * 64}),
            )
            trainer.current_gradient_accumulation_steps = 1
            trainer.model.train()
            chosen = {**inputs, "advantages": inputs["advantages"][loss_type]}
            loss = trainer._compute_loss(trainer.model, chosen)
            loss.backward()
            found[loss_type] = {
                "loss": float(loss.detach()),
                "gradients": {n: p.grad.clone() for n, p in trainer.model.named_parameters()},
            }
    return found


def main() -> None:
    what, source, target = sys.argv[1:]
    if what == "step":
        result = step(json.loads(Path(source).read_text(encoding="utf-8")))
        Path(target).write_text(json.dumps(result), encoding="utf-8")
    else:
        torch.save(losses(torch.load(source)), target)


if __name__ == "__main__":
    main()
