"""The parts of gpu.py: each yields rows, one a measurement; one that fails is a row with its error.

- golden: the kernel of `learner.attention: flex` against softmax in float64; log-probs and
  gradients of shared-prompt rows (trees of several levels, windows) against plain transformers on
  single sequences, in float32; a step of the real LearnerWorker (bfloat16, ZeRO 1), its gradient
  norm, and its published file read back.
- speed: forward and backward of 8k tokens in each attention; shares are of the measured product.
- sharing: eight completions behind a prompt that is 80 % of each sequence, in rows of 2k, 8k and
  32k tokens; with the prompt shared, repeated, and repeated under transformers' own causal
  attention (torch's flash kernel, no mask).
- step: whole steps of a LearnerWorker (ZeRO 1, AdamW, published weights), memory against 18 bytes
  a parameter.
- seven: 7B: a pass of all layers without optimizer, and whole steps of as many layers as fit with
  one. There is no LoRA yet.
- float8: passes beside bfloat16.
- ipc: packed weights to another process on the same GPU, by CUDA IPC and by our file in shared
  memory.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import statistics
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gpu_golden
import torch
from gpu_ipc import ipc
from learner_speed import flops, inputs_of, measure_peak, random_model, synchronize

Row = dict[str, Any]
Rows = tuple[int, int, int, int]  # as learner_speed.py has them
GIB = 2**30
PROMPT_PARTS, COMPLETIONS = 4, 8  # a prompt is so many times as long as a completion


@dataclass(frozen=True)
class Given:
    """How the script was started. dynamic: how flex is compiled, see `cohort.learner.flex`."""

    device: str
    tiny: bool
    dynamic: bool | None

    def shape(self, name: str) -> str:
        """A model's name."""
        return "tiny" if self.tiny else name

    def row(self, length: int) -> Rows:
        """(prompt, completions, tokens of each, rows) of a shared row of about this length."""
        size = (length // 32 if self.tiny else length) // (PROMPT_PARTS + COMPLETIONS)
        return PROMPT_PARTS * size, COMPLETIONS, size, 1


def attempt(what: str, measure: Callable[[], Row]) -> Row:
    """A measurement; its error where it fails."""
    try:
        return {"what": what, **measure()}
    except Exception as error:  # noqa: BLE001 - every failure is a row
        traceback.print_exc()
        first = " ".join(str(error).split())[:160]
        return {"what": what, "error": f"{type(error).__name__}: {first}"}
    finally:
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()


def timed(policy: Any, batches: list[Any], work: float, repeats: int, device: str) -> Row:
    """Forward and backward over some micro-batches; the first pass is not counted."""
    seconds, peaks, state = [], [], 0
    chunk = 1024
    for repeat in range(repeats + 1):
        if repeat:
            peaks.append(measure_peak(device))
        if repeat == 1 and device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            state = torch.cuda.memory_allocated()
        policy.zero_grad(set_to_none=False)
        synchronize(device)
        began = time.monotonic()
        for inputs in batches:
            logprobs, _ = policy(inputs, 1.0, max(1, -(-len(inputs.target_T) // chunk)))
            logprobs.sum().backward()
        synchronize(device)
        seconds.append(time.monotonic() - began)
    tokens = sum(len(inputs.input_ids_N) for inputs in batches)
    middle = statistics.median(seconds[1:])
    peak = statistics.median(peaks)
    row: Row = {
        "tokens": tokens, "s": middle, "range_s": f"{min(seconds[1:]):.3f}-{max(seconds[1:]):.3f}",
        "first_s": seconds[0], "tokens_per_s": tokens / middle, "tflops": work / middle / 1e12,
        "product_tflops": peak / 1e3, "share": work / middle / 1e9 / peak,
    }  # fmt: skip
    if device == "cuda":
        most = torch.cuda.max_memory_allocated() / GIB
        row |= {"weights_and_gradients_gib": state / GIB, "peak_gib": most}
    return row


def fuse(model: Any, device: str, also: tuple[str, ...] = ()) -> None:
    """Compile what is made of many small operations: feed-forward layers and norms."""
    backend = "inductor" if device == "cuda" else "aot_eager"
    for module in model.modules():
        kind = type(module).__name__
        # Our norm on CPUs cannot be traced.
        norm = "RMSNorm" in kind and device == "cuda"
        if kind.endswith("MLP") or norm or kind in also:
            module.compile(dynamic=True, backend=backend)


def policy_of(model: Any, attention: str, checkpointing: bool = False) -> Any:
    """The policy around a model, not checked as a learner's is: golden is the check here.

    attention: `learner.attention`, or "plain": transformers' own causal attention, without a mask.
    """
    from cohort.learner.logprobs import PolicyModel

    policy = PolicyModel(model, "sdpa" if attention == "plain" else attention, checkpointing)
    if attention == "plain":
        policy.shares_prompts = False
        model.set_attn_implementation("sdpa")
    return policy


def passes(
    given: Given, model: Any, shapes: list[Rows], attention: str, repeats: int = 3,
    checkpointing: bool = False,
) -> Row:  # fmt: skip
    """Forward and backward over micro-batches of these shapes."""
    policy = policy_of(model, attention, checkpointing)
    batches = [inputs_of(shape, model.config.vocab_size, given.device) for shape in shapes]
    parameters = sum(p.numel() for p in model.parameters())
    work = sum(flops(shape, model.config, parameters) for shape in shapes)
    return timed(policy, batches, work, repeats, given.device)


def speed(given: Given) -> Iterator[Row]:
    """Forward and backward at 0.5B and 1.5B."""
    shared = given.row(8192)
    prompt, count, size, _ = shared
    single = (1, 1, prompt + count * size - 1, 1)
    kinds = {shared: "8 behind one prompt", single: "one sequence"}
    for name in ("1.5b", "0.5b"):
        model = random_model(given.shape(name), given.device)
        for attention, rows in [
            ("flex", shared), ("flex", single), ("plain", single), ("sdpa", shared),
            ("tree", shared),
        ]:  # fmt: skip
            yield attempt(
                f"{name} {attention}, {kinds[rows]}",
                partial(passes, given, model, [rows], attention),
            )
        fuse(model, given.device)
        for rows, kind in kinds.items():
            yield attempt(
                f"{name} flex, feed-forward and norms compiled, {kind}",
                partial(passes, given, model, [rows], "flex"),
            )
        del model
        gc.collect()


def sharing(given: Given) -> Iterator[Row]:
    """The same completions with their prompt shared and repeated."""
    model = random_model(given.shape("1.5b"), given.device)
    for length in (2048, 8192, 32768):
        prompt, count, size, _ = given.row(length)
        # Micro-batches of repeated prompts hold no more tokens than the shared row.
        fit = (prompt + count * size) // (prompt + size)
        repeated = [(prompt, 1, size, fit)] * (count // fit)
        long = length > 8192
        ways = {
            "shared, flex": ("flex", [(prompt, count, size, 1)]),
            "repeated, flex": ("flex", repeated),
            "repeated, plain causal": ("plain", repeated),
        }
        shared_s = None
        for way, (attention, shapes) in ways.items():
            row = attempt(
                f"1.5b, row of {length}, {way}{', recomputing' if long else ''}",
                partial(passes, given, model, shapes, attention, 1 if long else 3, long),
            )
            if attention == "flex" and shared_s is None:
                shared_s = row.get("s")
            elif shared_s is not None and "s" in row:
                row["shared_is_faster"] = row["s"] / shared_s
            yield row


@contextlib.contextmanager
def saved(shape: str, device: str, layers: int | None) -> Iterator[Path]:
    """A random model as a Hugging Face folder in memory."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        model = random_model(shape, device, layers)
        model.save_pretrained(folder)
        del model
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        yield Path(folder)


def steps(given: Given, name: str, layers: int | None, groups: int, checkpointing: bool) -> Row:
    """Whole steps, as learner_step.py measures them."""
    import learner_step

    prompt, _, size, _ = given.row(8192)
    with saved(given.shape(name), given.device, layers) as folder:
        options = argparse.Namespace(
            model=folder, groups=groups, prompt=prompt, completion=size, attention="auto",
            micro_batch_tokens=8192, logit_chunk_tokens=1024, repeats=2, threads=1,
            gradient_checkpointing=checkpointing, device=given.device,
        )  # fmt: skip
        found = learner_step.measure(options, stage=1, float8="off")
    memory, parameters = found["memory"], found["parameters"]
    return {
        "parameters": parameters, "tokens": found["tokens"],
        "micro_batches": found["micro_batches"], "recomputed": checkpointing,
        "s": statistics.median(found["step_s"]), "first_s": found["first_step_s"],
        "tokens_per_s": found["tokens_per_s"], "share": found["share"],
        "publish_s": statistics.median(found["publish_s"]),
        "state_gib": found["state_bytes"] / GIB, "18_bytes_a_parameter_gib": 18 * parameters / GIB,
        "peak_gib": memory.get("peak_device_bytes", memory["peak_rss_bytes"]) / GIB,
    }  # fmt: skip


def step(given: Given) -> Iterator[Row]:
    """Whole steps at 1.5B."""
    row = attempt("1.5b, ZeRO 1, four rows of 8k", lambda: steps(given, "1.5b", None, 4, False))
    yield row
    if "OutOfMemory" in row.get("error", ""):
        torch.distributed.destroy_process_group()
        yield attempt(
            "1.5b, ZeRO 1, four rows of 8k, recomputing",
            lambda: steps(given, "1.5b", None, 4, True),
        )


def seven(given: Given) -> Iterator[Row]:
    """7B shapes."""

    def whole() -> Row:
        model = random_model(given.shape("7b"), given.device)
        return passes(given, model, [given.row(8192)], "flex", 2, checkpointing=True)

    yield attempt("7b, all 28 layers, a pass, recomputing, NO optimizer", whole)
    layers = None if given.tiny else 8
    yield attempt(
        "7b shapes, 8 of 28 layers, whole steps, ZeRO 1, recomputing (no LoRA yet)",
        lambda: steps(given, "7b", layers, 2, True),
    )


def float8(given: Given) -> Iterator[Row]:
    """Passes at 1.5B with the linear layers in float8."""
    from cohort.learner.float8 import convert

    for recipe, compiled in [
        ("off", True), ("tensorwise", True), ("rowwise", True), ("tensorwise", False)
    ]:  # fmt: skip

        def measure(recipe: Any = recipe, compiled: bool = compiled) -> Row:
            torch._dynamo.reset()
            model = random_model(given.shape("1.5b"), given.device)
            if recipe != "off":
                convert(model, recipe, torch.device(given.device))
            if compiled:
                fuse(model, given.device, ("Float8Linear",))
            return passes(given, model, [given.row(8192)], "flex")

        compiled_says = ", compiled layers" if compiled else ""
        yield attempt(f"1.5b, float8 {recipe}{compiled_says}", measure)


def prepared(part: Callable[[Given], Iterator[Row]]) -> Callable[[Given], Iterator[Row]]:
    """A part after what all have in common."""

    def run(given: Given) -> Iterator[Row]:
        from cohort.learner import flex

        flex.DYNAMIC = given.dynamic
        if given.device == "cpu":
            from torch.nn.attention import flex_attention as torchs

            # torch refuses gradients on CPUs before it looks; what it computes there has them.
            torchs._validate_device = lambda *_: None
        elif part is not processes:
            # Fewer pieces of free memory that fit nothing; other processes cannot open such ones.
            torch.cuda.memory._set_allocator_settings("expandable_segments:True")
        yield from part(given)

    return run


def processes(given: Given) -> Iterator[Row]:
    """Weights between two processes."""
    yield from ipc(given, attempt)


PARTS = {
    name: prepared(part)
    for name, part in {
        "golden": lambda given: gpu_golden.golden(given, attempt),
        "speed": speed,
        "sharing": sharing,
        "step": step,
        "seven": seven,
        "float8": float8,
        "ipc": processes,
    }.items()
}
