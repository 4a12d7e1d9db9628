"""The part golden of gpu.py: is what the GPU computes right?"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
Attempt = Callable[[str, Callable[[], Row]], Row]
# Errors are norms of differences over norms of what is expected.
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
MODEL: dict[str, Any] = dict(
    hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=14,
    num_key_value_heads=2, head_dim=64, max_position_embeddings=128, pad_token_id=2,
    bos_token_id=1, eos_token_id=2, initializer_range=0.1,
)  # fmt: skip


def golden(given: Any, attempt: Attempt) -> Iterator[Row]:
    """Kernel, models, worker."""
    from cohort.learner import flex

    # How the kernel is compiled: for all lengths at once, or, where that fails, for each.
    row: Row = {}
    for dynamic in (True, None):
        flex.DYNAMIC = dynamic
        flex._compiled.cache_clear()
        torch._dynamo.reset()
        how = "for all lengths" if dynamic else "by length"
        row = attempt(f"kernel compiled {how}", lambda: kernels(given.device, torch.float32))
        if row.get("pass"):
            row["found"] = {"dynamic": dynamic}
            yield row
            break
        yield row
    yield attempt("kernel, bfloat16", lambda: kernels(given.device, torch.bfloat16))
    for kind in ("qwen2", "mistral, window", "gemma3, windows"):
        for attention in ("flex", "tree", "sdpa"):
            yield attempt(
                f"{kind}, {attention}, float32, against transformers",
                lambda kind=kind, attention=attention: against_transformers(
                    given.device, kind, attention
                ),
            )
    yield attempt("LearnerWorker, bfloat16, ZeRO 1", lambda: a_worker(given.device))
    yield attempt("kernel at 8k, by length and for all lengths", lambda: kernel_speed(given))


def trees() -> dict[str, Any]:
    """Flat, and of several levels, where branches continue parts of branches."""
    from cohort.learner.attention import Tree
    from cohort.learner.shapes import Join, RowShape

    deep = RowShape(
        300, (200, 90, 0, 150, 40),
        (Join(None, 300), Join(0, 420), Join(1, 500), Join(2, 350), Join(None, 100)),
    )  # fmt: skip
    return {
        "flat": Tree((RowShape(700, (70, 210, 130)), RowShape(5, (3, 9)))),
        "deep": Tree((deep, RowShape(33, (20,)), deep)),
    }


def all_pairs(tree: Any, length: int, window: int | None, device: str) -> torch.Tensor:
    """[L, L] bool, True: hidden; from the mask of every row by itself."""
    from cohort.learner.attention import Tree

    visible = torch.eye(length, dtype=torch.bool)
    start = 0
    for row in tree.rows:
        own = slice(start, start + row.length)
        visible[own, own] = Tree((row,)).mask(row.length, torch.device("cpu"))[0, 0]
        start += row.length
    if window is not None:
        depth = visible.sum(1)
        visible &= depth[:, None] - depth < window
    return ~visible.to(device)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """|found - expected| / |expected|."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def kernels(device: str, dtype: torch.dtype) -> Row:
    """The kernel's output and gradients against softmax in float64."""
    from cohort.learner import flex
    from cohort.learner.shapes import padded_length

    worst, seconds = {"output": 0.0, "gradients": 0.0}, []
    # Heads as the models below and Qwen2.5-1.5B have them: every other shape is compiled anew.
    heads, groups, size = (14, 2, 64) if dtype == torch.float32 else (12, 2, 128)
    for tree in trees().values():
        for window in (None, 50) if dtype == torch.float32 else (None,):
            used = sum(row.length for row in tree.rows)
            length = padded_length(used, flex.FLEX_MULTIPLE)
            # Laid out as models do.
            q, k, v, slopes = (
                torch.randn(1, length, n, size, device=device, dtype=dtype).transpose(1, 2)
                for n in (heads, groups, groups, heads)
            )
            for x in (q, k, v):
                x.requires_grad_()
            intervals = flex.Intervals.of(tree, length)
            mask = flex.block_mask(intervals, torch.device(device), window)
            began = time.monotonic()
            out, _ = flex.flex_attention_forward(torch.nn.Identity(), q, k, v, mask)
            out = out.transpose(1, 2)
            gradients = torch.autograd.grad((out * slopes).sum(), (q, k, v))
            if device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.monotonic() - began)
            exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
            keys, values = (x.repeat_interleave(heads // groups, 1) for x in exact[1:])
            scores = exact[0] @ keys.mT * size**-0.5
            hidden = all_pairs(tree, length, window, device)
            expected = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values
            wanted = torch.autograd.grad((expected * slopes).sum(), exact)
            worst["output"] = max(worst["output"], error(out, expected))
            for mine, theirs in zip(gradients, wanted, strict=True):
                worst["gradients"] = max(worst["gradients"], error(mine, theirs))
    return {
        **worst, "limit": LIMITS[dtype], "pass": max(worst.values()) <= LIMITS[dtype],
        "longest_first_call_s": max(seconds), "calls_s": sum(seconds),
    }  # fmt: skip


def small_model(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A random model on the CPU with the vocabulary of the tests."""
    from transformers import (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        MistralConfig,
        MistralForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
    )

    from tests.learner.helpers import VOCABULARY

    torch.manual_seed(0)
    shape = MODEL | {"vocab_size": VOCABULARY}
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**shape)).eval().to(dtype)
    if kind.startswith("mistral"):
        return MistralForCausalLM(MistralConfig(**shape, sliding_window=5)).eval().to(dtype)
    shape |= {"hidden_size": 112}  # it must be a multiple of the heads
    config = Gemma3TextConfig(**shape, sliding_window=5, query_pre_attn_scalar=64)
    return Gemma3ForCausalLM(config).eval().to(dtype)


def groups_of_all_kinds() -> list[Any]:
    """Episodes whose history forks, at several levels, and plain completions."""
    from tests.learner.episodes import FORKS, PROMPT, SHAPES, episode_group
    from tests.learner.helpers import scored_group

    return [
        episode_group("a", SHAPES, [1.0, 0.0, 0.5, 0.2]),
        episode_group("bb", [FORKS, ()], [1.0, 0.0]),
        scored_group("c", [1.0, 0.0], [3, 9], prompt_tokens=PROMPT),
    ]


def against_transformers(device: str, kind: str, attention: str) -> Row:
    """Log-probs and gradients of shared rows against single sequences, the tests' reference."""
    from cohort.learner.batch import build_micro_batch
    from cohort.learner.logprobs import PolicyModel
    from cohort.learner.packing import Packer, RowCost
    from cohort.learner.plan import score_batches
    from tests.learner.episodes import episode_logprobs
    from tests.learner.helpers import metas, reference_logprobs

    groups = groups_of_all_kinds()
    model = small_model(kind).to(device)
    policy = PolicyModel(model, attention)
    packer = Packer(ranks=1, micro_batch_tokens=10_000, cost=RowCost(quadratic=0.0))
    [[batch]] = score_batches([metas(group)[0] for group in groups], packer)
    tensors = build_micro_batch(batch, {group.group.id: group for group in groups})
    logprobs, _ = policy(tensors.to(torch.device(device)), 0.7, 2)
    slopes = torch.randn(len(logprobs), generator=torch.Generator().manual_seed(0)).to(device)
    (logprobs * slopes).mean().backward()
    found = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()

    model.set_attn_implementation("eager")
    by_id = {}
    with torch.device(device):
        for group in groups:
            prompt = group.group.prompt.token_ids
            for c in group.group.completions:
                if c.turns:
                    by_id[c.id] = episode_logprobs(model, prompt, c, 0.7)
                elif len(c.token_ids):
                    by_id[c.id] = reference_logprobs(model, prompt, c.token_ids, 0.7)
    expected = torch.cat([by_id[segment.completion_id] for segment in batch.segments])
    (expected * slopes).mean().backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    differences = [(found[name] - p.grad).norm() for name, p in model.named_parameters()]
    worst = float((logprobs - expected).detach().abs().max())
    gradients = float(max(differences) / norm)
    limit = LIMITS[torch.float32]
    return {
        "rows": len(batch.rows), "scored_tokens": len(expected), "log_probs": worst,
        "gradients": gradients, "limit": limit, "pass": max(worst, gradients) <= limit,
    }  # fmt: skip


def a_worker(device: str) -> Row:
    """A step of a LearnerWorker, and what it published."""
    from safetensors.torch import load_file

    from cohort.learner.config import AlgorithmConfig, LearnerConfig
    from cohort.learner.packing import Packer, RowCost
    from cohort.learner.plan import plan_step
    from cohort.learner.spec import LearnerSpec
    from cohort.learner.worker import LearnerWorker
    from tests.learner.helpers import metas, reference_logprobs, reference_loss

    groups = [group for group in groups_of_all_kinds() if group.group.id == "c"]
    algorithm = AlgorithmConfig()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as shm:
        model = small_model("qwen2", torch.bfloat16)
        folder = Path(shm) / "model"
        model.save_pretrained(folder)
        # The norm that float32 arithmetic finds for the same weights, a token at a time.
        model.float()
        reference_loss(model, groups, temperature=1.0).backward()
        wanted = float(torch.stack([p.grad.norm() for p in model.parameters()]).norm())
        spec = LearnerSpec(
            model_path=str(folder), dtype="bfloat16",
            learner=LearnerConfig(zero_stage=1, learning_rate=1e-2), algorithm=algorithm,
            temperature=1.0, max_tokens=32, rank=0, world_size=1, device=device, threads=1,
            seed=0, shm_dir=str(Path(shm) / "weights"),
        )  # fmt: skip
        worker = LearnerWorker(spec)
        _, port = worker.rendezvous()
        facts = worker.setup("127.0.0.1", port, timeout_s=120)
        cost = RowCost(facts.attention_work, facts.masked_attention, facts.length_multiple)
        plan = plan_step(
            [metas(group) for group in groups], algorithm,
            Packer(1, 8192, 1024, cost, facts.shares_prompts), max_tokens=32,
        )  # fmt: skip
        before = {n: p.detach().clone() for n, p in worker.state.model.named_parameters()}
        result = worker.step([plan.updates[0][0]], groups).updates[0]
        info = worker.publish(1, [], remote=False)
        assert info is not None
        published = load_file(info.path)
        now = dict(worker.state.model.named_parameters())
        equal = all(torch.equal(now[name].cpu(), tensor) for name, tensor in published.items())
        names = set(now) - {"lm_head.weight"} <= set(published)
        moved = sum(not torch.equal(before[n], p) for n, p in now.items()) / len(now)
        group = groups[0].group
        ids = group.completions[1].token_ids
        model.load_state_dict(published, strict=False)
        model.tie_weights()
        with torch.no_grad():
            plain = reference_logprobs(model, group.prompt.token_ids, ids, 1.0)
        ours = worker.logprobs([*group.prompt.token_ids, *(int(t) for t in ids)])
        scored = float((torch.tensor(ours[-len(ids) :]) - plain).abs().max())
        norm_error = abs(result.grad_norm - wanted) / wanted
    return {
        "attention": worker.state.policy.kernel(worker.state.device), "applied": result.applied,
        "gradient_norm_error": norm_error, "parameters_moved": moved,
        "published_is_read_back": equal and names, "log_probs": scored, "limit": 0.05,
        "pass": result.applied and equal and names and moved == 1.0
        and norm_error <= 0.05 and scored <= 0.05,
    }  # fmt: skip


def kernel_speed(given: Any) -> Row:
    """Milliseconds of a layer's attention at 8k, forward and backward, against torch's flash."""
    from cohort.learner import flex
    from cohort.learner.attention import Tree
    from cohort.learner.shapes import RowShape, padded_length

    prompt, count, size, _ = given.row(8192)
    row: Row = {}
    heads, groups, width = (12, 2, 128) if given.device == "cuda" else (4, 2, 16)
    tree = Tree((RowShape(prompt, (size,) * count),))
    length = padded_length(tree.longest, flex.FLEX_MULTIPLE)
    mask = flex.block_mask(flex.Intervals.of(tree, length), torch.device(given.device))
    q, k, v = (
        torch.randn(
            1, n, length, width, device=given.device, dtype=torch.bfloat16, requires_grad=True
        )
        for n in (heads, groups, groups)
    )

    def milliseconds(attend: Callable[[], torch.Tensor]) -> float:
        seconds = []
        for _ in range(8):
            if given.device == "cuda":
                torch.cuda.synchronize()
            began = time.monotonic()
            attend().sum().backward()
            if given.device == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.monotonic() - began)
        return sorted(seconds[2:])[3] * 1e3

    for dynamic, name in ((True, "all_lengths_ms"), (False, "by_length_ms")):
        flex.DYNAMIC = dynamic
        flex._compiled.cache_clear()
        torch._dynamo.reset()
        row[name] = milliseconds(
            lambda: flex.flex_attention_forward(torch.nn.Identity(), q, k, v, mask)[0]
        )
    row["flash_causal_ms"] = milliseconds(
        lambda: torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )
    )
    causal = length * (length + 1) / 2
    pairs = prompt**2 / 2 + count * (size * prompt + size**2 / 2)
    return row | {"blocks_left_out": f"{mask.sparsity():.0f} %", "pairs_of_causal": pairs / causal}
