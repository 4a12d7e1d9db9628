"""The parts of gpu.py: each yields rows, one a measurement; one that fails is a row with its error.

- golden: the kernel of `learner.attention: flash` against softmax in float64; compiled layers and
  fused scores against plain transformers on single sequences, in float32; a step of the real
  LearnerWorker (bfloat16, ZeRO 1), its gradient norm, and its published file read back.
- golden_flex: the same of `learner.attention: flex`, also with windows; layers not compiled.
- warm: compiles what the other parts measure into torch's cache on disk; may run beside golden.
- speed: forward and backward of 8k tokens, attention, compiled layers and fused scores one after
  another; shares are of the measured product. Rows of 256 tokens say what launches cost.
- sharing: eight completions behind a prompt that is 80 % of each sequence, in rows of 2k, 8k and
  32k tokens; with the prompt shared, and repeated under transformers' own causal attention (no
  mask). Layers and scores are compiled on both sides.
- profile: the kernels of one pass, and how long the GPU was busy.
- step: whole steps of a LearnerWorker (ZeRO 1, AdamW, published weights), memory against 18 bytes
  a parameter.
- seven: 7B: a pass of all layers without optimizer, and whole steps of as many layers as fit with
  one. There is no LoRA yet.
- float8: passes beside bfloat16, layers compiled.
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
CHUNK = 1024  # scored tokens whose logits exist at one time
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
        size = max(1, (length // 32 if self.tiny else length) // (PROMPT_PARTS + COMPLETIONS))
        return PROMPT_PARTS * size, COMPLETIONS, size, 1


@dataclass(frozen=True)
class How:
    """What is compiled, and whether layers are computed again in the backward pass."""

    layers: bool = False
    scores: bool = False
    recompute: bool = False

    def __str__(self) -> str:
        said = {"layers compiled": self.layers, "scores fused": self.scores}
        said["recomputing"] = self.recompute
        return "".join(f", {name}" for name, used in said.items() if used)


LAYERS, BOTH = How(layers=True), How(layers=True, scores=True)


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
    seconds, launched, peaks, state = [], [], [], 0
    for repeat in range(repeats + 1):
        if repeat == 1 or (repeat and device == "cuda"):  # on CPUs it takes seconds
            peaks.append(measure_peak(device))
        if repeat == 1 and device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            state = torch.cuda.memory_allocated()
        policy.zero_grad(set_to_none=False)
        synchronize(device)
        began = time.monotonic()
        for inputs in batches:
            logprobs, _ = policy(inputs, 1.0, max(1, -(-len(inputs.target_T) // CHUNK)))
            logprobs.sum().backward()
        launched.append(time.monotonic() - began)
        synchronize(device)
        seconds.append(time.monotonic() - began)
    tokens = sum(len(inputs.input_ids_N) for inputs in batches)
    middle = statistics.median(seconds[1:])
    peak = statistics.median(peaks)
    row: Row = {
        "tokens": tokens, "s": middle, "range_s": f"{min(seconds[1:]):.3f}-{max(seconds[1:]):.3f}",
        "first_s": seconds[0], "launched_s": statistics.median(launched[1:]),
        "tokens_per_s": tokens / middle, "tflops": work / middle / 1e12,
        "product_tflops": peak / 1e3, "share": work / middle / 1e9 / peak,
    }  # fmt: skip
    if device == "cuda":
        most = torch.cuda.max_memory_allocated() / GIB
        row |= {"weights_and_gradients_gib": state / GIB, "peak_gib": most}
    return row


def policy_of(model: Any, attention: str, how: How, device: str) -> Any:
    """The policy around a model, not checked as a learner's is: golden is the check here.

    attention: `learner.attention`, or "plain": transformers' own causal attention, without a mask.
    """
    from cohort.learner.logprobs import PolicyModel, _decoder_layers

    for layer in _decoder_layers(model):
        layer._compiled_call_impl = None  # as it was before another policy compiled it
    policy = PolicyModel(model, "sdpa" if attention == "plain" else attention, how.recompute)
    if attention == "plain":
        policy.shares_prompts = False
        model.set_attn_implementation("sdpa")
    if how.layers:
        policy.compile_parts("inductor" if device == "cuda" else "aot_eager")
    policy.fuses_scores = how.scores
    return policy


def passes(
    given: Given, model: Any, shapes: list[Rows], attention: str, how: How, repeats: int = 3
) -> Row:
    """Forward and backward over micro-batches of these shapes."""
    policy = policy_of(model, attention, how, given.device)
    batches = [inputs_of(shape, model.config.vocab_size, given.device) for shape in shapes]
    parameters = sum(p.numel() for p in model.parameters())
    work = sum(flops(shape, model.config, parameters) for shape in shapes)
    return timed(policy, batches, work, repeats, given.device)


def warm(given: Given) -> Iterator[Row]:
    """Two layers of every model that is compiled; all layers are compiled as one."""
    from cohort.learner.float8 import convert

    for name, attention, recipe in [
        ("1.5b", "flash", "off"), ("1.5b", "plain", "off"), ("1.5b", "flash", "tensorwise"),
        ("7b", "flash", "off"), ("1.5b", "flex", "off"), ("1.5b", "flash", "rowwise"),
    ]:  # fmt: skip

        def once(name: str = name, attention: str = attention, recipe: Any = recipe) -> Row:
            torch._dynamo.reset()
            began = time.monotonic()
            model = random_model(given.shape(name), given.device, 2)
            if recipe != "off":
                convert(model, recipe, torch.device(given.device))
            policy = policy_of(model, attention, BOTH, given.device)
            for length, rows in ((8192, 1), (256, 2)):
                prompt, count, size, _ = given.row(length)
                count = 1 if attention == "plain" else count
                shape = (prompt, count, size, rows)
                inputs = inputs_of(shape, model.config.vocab_size, given.device)
                policy(inputs, 1.0, 2)[0].sum().backward()
            return {"s": time.monotonic() - began}

        yield attempt(f"{name}, {attention}, float8 {recipe}", once)


def speed(given: Given) -> Iterator[Row]:
    """Forward and backward at 1.5B."""
    shared, short = given.row(8192), given.row(256)
    prompt, count, size, _ = shared
    single = (1, 1, prompt + count * size - 1, 1)
    kinds = {shared: "8 behind one prompt", single: "one sequence", short: "256 tokens"}
    model = random_model(given.shape("1.5b"), given.device)
    for attention, rows, how in [
        ("flash", shared, How()), ("flash", short, How()),
        ("flash", shared, LAYERS), ("flash", shared, BOTH), ("flash", short, BOTH),
        ("flash", single, BOTH), ("plain", single, BOTH), ("plain", single, How()),
        ("flex", shared, How()), ("flex", short, How()), ("flex", shared, BOTH),
    ]:  # fmt: skip
        yield attempt(
            f"1.5b {attention}{how}, {kinds[rows]}",
            partial(passes, given, model, [rows], attention, how),
        )
    yield attempt("kernels of a layer at 8k", lambda: gpu_golden.kernel_speed(given))


def sharing(given: Given) -> Iterator[Row]:
    """The same completions with their prompt shared and repeated."""
    model = random_model(given.shape("1.5b"), given.device)
    for length in (8192, 2048, 32768):
        prompt, count, size, _ = given.row(length)
        # Micro-batches of repeated prompts hold no more tokens than the shared row.
        fit = (prompt + count * size) // (prompt + size)
        repeated = [(prompt, 1, size, fit)] * (count // fit)
        how = How(layers=True, scores=True, recompute=length > 8192)
        shared_s = None
        for way, attention, shapes in [
            ("shared", "flash", [(prompt, count, size, 1)]),
            ("repeated", "plain", repeated), ("repeated", "flash", repeated),
        ]:  # fmt: skip
            row = attempt(
                f"1.5b, row of {length}, {way}, {attention}{how}",
                partial(passes, given, model, shapes, attention, how, 1 if how.recompute else 3),
            )
            if way == "shared":
                shared_s = row.get("s")
            elif shared_s is not None and "s" in row:
                row["shared_is_faster"] = row["s"] / shared_s
            yield row


def profile(given: Given) -> Iterator[Row]:
    """Where the time of a pass goes."""
    from torch.profiler import ProfilerActivity

    model = random_model(given.shape("1.5b"), given.device)
    policy = policy_of(model, "flash", BOTH, given.device)
    inputs = inputs_of(given.row(8192), model.config.vocab_size, given.device)
    cuda = given.device == "cuda"

    def one() -> float:
        policy.zero_grad(set_to_none=False)
        synchronize(given.device)
        began = time.monotonic()
        logprobs, _ = policy(inputs, 1.0, max(1, -(-len(inputs.target_T) // CHUNK)))
        logprobs.sum().backward()
        synchronize(given.device)
        return time.monotonic() - began

    plain_s = [one() for _ in range(4)][-1]
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as found:
        profiled_s = one()
    kernels = [
        (e.self_device_time_total if cuda else e.self_cpu_time_total, e.count, e.key)
        for e in found.key_averages()
        if not e.is_user_annotation and not e.key.startswith("##")
    ]
    busy = sum(us for us, _, _ in kernels) / 1e6
    yield {
        "what": "1.5b flash, all compiled, 8 behind one prompt", "ms": plain_s * 1e3,
        "profiled_ms": profiled_s * 1e3, "busy_ms": busy * 1e3, "busy_share": busy / plain_s,
        "calls": sum(count for us, count, _ in kernels if us),
    }  # fmt: skip
    for us, count, name in sorted(kernels, reverse=True)[:12]:
        yield {"what": name[:90], "ms": us / 1e3, "calls": count, "busy_share": us / 1e6 / busy}


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
        how = How(layers=True, scores=True, recompute=True)
        return passes(given, model, [given.row(8192)], "flash", how, 1)

    yield attempt("7b, all 28 layers, a pass, recomputing, NO optimizer", whole)
    layers = None if given.tiny else 8
    yield attempt(
        "7b shapes, 8 of 28 layers, whole steps, ZeRO 1, recomputing (no LoRA yet)",
        lambda: steps(given, "7b", layers, 2, True),
    )


def float8(given: Given) -> Iterator[Row]:
    """Passes at 1.5B with the linear layers in float8."""
    from cohort.learner.float8 import convert

    for recipe in ("tensorwise", "off", "rowwise"):

        def measure(recipe: Any = recipe) -> Row:
            torch._dynamo.reset()
            model = random_model(given.shape("1.5b"), given.device)
            if recipe != "off":
                convert(model, recipe, torch.device(given.device))
            return passes(given, model, [given.row(8192)], "flash", BOTH)

        yield attempt(f"1.5b flash, float8 {recipe}{BOTH}", measure)


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
        "golden_flex": lambda given: gpu_golden.golden_flex(given, attempt),
        "warm": warm,
        "speed": speed,
        "sharing": sharing,
        "profile": profile,
        "step": step,
        "seven": seven,
        "float8": float8,
        "ipc": processes,
    }.items()
}
