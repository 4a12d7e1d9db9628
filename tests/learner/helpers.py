"""Tiny models and groups, and the slow, obvious GRPO step that the learner is held against."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from cohort.actors.records import (
    Completion,
    Group,
    GroupMeta,
    Prompt,
    ScoredGroup,
    ScoredRef,
    ScoreMeta,
)
from cohort.learner.config import AlgorithmConfig

VOCABULARY = 67
SHAPE: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    pad_token_id=2,
    bos_token_id=1,
    eos_token_id=2,
    initializer_range=0.3,
)


def tiny_model(kind: str, seed: int = 0) -> Any:
    """A random model; large initial weights make wrong masks and positions visible."""
    torch.manual_seed(seed)
    if kind == "llama-tied":
        return LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)).eval()
    if kind == "qwen2-untied":
        return Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=False)).eval()
    if kind == "gpt2":
        config = GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=128,
            resid_pdrop=0.5,
            embd_pdrop=0.5,
            attn_pdrop=0.5,
            initializer_range=0.3,
            bos_token_id=1,
            eos_token_id=2,
        )
        return GPT2LMHeadModel(config).eval()
    if kind == "gemma2":
        # Layers alternate between full and sliding attention; the cap bites at these logits.
        config = Gemma2Config(
            **SHAPE, sliding_window=5, query_pre_attn_scalar=8, final_logit_softcapping=2.0
        )
        return Gemma2ForCausalLM(config).eval()
    if kind == "granite":
        return GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=3.0)).eval()
    if kind.startswith("qwen3"):
        tied = kind == "qwen3-tied"
        return Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=tied)).eval()
    if kind == "gemma":
        return GemmaForCausalLM(GemmaConfig(**SHAPE)).eval()
    if kind == "gemma3":
        config = Gemma3TextConfig(**SHAPE, sliding_window=5, query_pre_attn_scalar=8)
        return Gemma3ForCausalLM(config).eval()
    if kind == "mamba":
        return MambaForCausalLM(
            MambaConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, state_size=4)
        ).eval()
    if kind == "mistral-sliding":
        return MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=5)).eval()
    raise ValueError(kind)


def scored_group(
    group_id: str,
    rewards: list[float | None],
    lengths: list[int],
    prompt_tokens: int = 7,
    truncated: tuple[int, ...] = (),
) -> ScoredGroup:
    """A group of random tokens; every completion but the truncated ones ends with token 2."""
    random = np.random.default_rng(sum(group_id.encode()))
    prompt = Prompt(
        id=f"p-{group_id}",
        token_ids=tuple(int(t) for t in random.integers(3, VOCABULARY, prompt_tokens)),
        content="",
    )
    completions = []
    for i, length in enumerate(lengths):
        ids = random.integers(0, VOCABULARY, length).astype(np.int64)
        if i not in truncated:
            ids[-1:] = 2
        completions.append(
            Completion(
                id=f"{group_id}/{i}",
                prompt_id=prompt.id,
                token_ids=ids,
                logprobs=np.full(length, -4.0, dtype=np.float32)
                + random.normal(0, 0.5, length).astype(np.float32),
                finish_reason="length" if i in truncated else "stop",
                seed=i,
                weight_versions=(0, 0),
                text="",
            )
        )
    return ScoredGroup(Group(group_id, prompt, tuple(completions)), {}, tuple(rewards))


def metas(group: ScoredGroup) -> tuple[GroupMeta, ScoreMeta]:
    completions = group.group.completions
    shapes = tuple(tuple(turn.shape for turn in c.turns) for c in completions)
    meta = GroupMeta(
        group_id=group.group.id,
        prompt_tokens=len(group.group.prompt.token_ids),
        completion_ids=tuple(c.id for c in completions),
        completion_tokens=tuple(len(c.token_ids) for c in completions),
        truncated=tuple(c.finish_reason == "length" for c in completions),
        weight_versions=(0, 0),
        actor="a",
        seconds=0.0,
        turns=shapes if any(shapes) else (),
    )
    return meta, ScoreMeta(group.group.id, group.totals, {}, (), 0.0)


def scored_ref(group: ScoredGroup) -> ScoredRef:
    meta, scores = metas(group)
    return ScoredRef(meta, scores, group)


def reference_logprobs(
    model: Any, prompt: tuple[int, ...], ids: np.ndarray, temperature: float
) -> torch.Tensor:
    """One sequence at a time, all logits, through the model's own forward."""
    sequence = torch.tensor([*prompt, *(int(t) for t in ids)])
    logits = model(input_ids=sequence[None], use_cache=False).logits[0].float() / temperature
    logprobs = logits.log_softmax(-1)
    return torch.stack([logprobs[t - 1, sequence[t]] for t in range(len(prompt), len(sequence))])


def reference_advantages(
    groups: list[ScoredGroup],
    algorithm: AlgorithmConfig,
    max_tokens: int,
    kl: dict[str, float] | None = None,
) -> tuple[list[tuple[int, ScoredGroup, int, float]], int]:
    """(prompt, group, index, advantage) of every completion that is trained, the long way, and how
    many completions were sampled and scored.

    kl: of each completion, for a KL in the reward.
    """
    shaped, sampled = [], 0
    equal_tasks = set()
    for group in groups:
        task: list[float | None] = []
        rewards: list[float | None] = []
        for completion, total in zip(group.group.completions, group.totals, strict=True):
            length = len(completion.token_ids)
            task.append(total if length else None)
            if total is not None and algorithm.overlong_buffer:
                soft = max_tokens * (1 - algorithm.overlong_buffer)
                over = max(0.0, length - soft) / (max_tokens - soft)
                total -= min(1.0, over)
            if total is not None and kl is not None and length:
                total -= algorithm.kl_coef * kl[completion.id]
            rewards.append(total if length else None)
        scored = [r for r in task if r is not None]
        if len(scored) < 2:
            continue
        sampled += len(scored)
        equal = max(scored) - min(scored) <= 1e-6
        if algorithm.drop_zero_variance and equal and algorithm.baseline != "none":
            continue
        if equal:
            equal_tasks.add(group.group.id)
        shaped.append((group, rewards))
    everything = [r for _, rewards in shaped for r in rewards if r is not None]
    found = []
    for prompt, (group, rewards) in enumerate(shaped):
        known = np.array([r for r in rewards if r is not None])
        for i, reward in enumerate(rewards):
            if reward is None:
                continue
            others = (known.sum() - reward) / (len(known) - 1)
            base = {"mean": known.mean(), "leave_one_out": others, "none": 0.0}[algorithm.baseline]
            std = {"group": known.std(), "batch": np.std(everything), "none": 1.0}[algorithm.scale]
            if kl is not None and algorithm.scale == "group" and group.group.id in equal_tasks:
                std = 1.0
            same = np.ptp(known) <= 1e-6 and algorithm.baseline != "none"
            advantage = 0.0 if same else float((reward - base) / std)
            cut = group.group.completions[i].finish_reason == "length"
            if not (cut and algorithm.mask_truncated):
                found.append((prompt, group, i, advantage))
    return found, sampled


def reference_loss(
    model: Any,
    groups: list[ScoredGroup],
    *,
    temperature: float,
    algorithm: AlgorithmConfig | None = None,
    max_tokens: int = 32,
    reference: Any = None,
    old: Any = None,
    kl: dict[str, float] | None = None,
    of_completion: Callable[..., torch.Tensor] | None = None,
) -> torch.Tensor:
    """The first update of a step as the papers have it: one completion, one token at a time.

    reference: the reference model; None: the model itself. old: the model at the start of the
    step; None: the model as it is. kl: of each completion, for a KL in the reward. of_completion:
    log-probs by (model, prompt's tokens, completion, temperature); None: without turns.
    """
    algorithm = algorithm or AlgorithmConfig()
    trained, sampled = reference_advantages(groups, algorithm, max_tokens, kl)
    lengths = [len(group.group.completions[i].token_ids) for _, group, i, _ in trained]
    by_prompt: dict[int, int] = {}
    for (prompt, *_), length in zip(trained, lengths, strict=True):
        by_prompt[prompt] = by_prompt.get(prompt, 0) + length
    loss = torch.zeros(())
    for (prompt, group, i, advantage), length in zip(trained, lengths, strict=True):
        completion = group.group.completions[i]

        def score(policy: Any, group: Any = group, completion: Any = completion) -> torch.Tensor:
            prompt = group.group.prompt.token_ids
            if of_completion is not None:
                return of_completion(policy, prompt, completion, temperature)
            return reference_logprobs(policy, prompt, completion.token_ids, temperature)

        now = score(model)
        mu = torch.from_numpy(completion.logprobs)
        start = now.detach() if old is None else score(old).detach()
        anchor = mu if algorithm.anchor == "engine" else start
        base = torch.zeros(length)
        if algorithm.kl_coef and algorithm.kl_in == "loss":
            with torch.no_grad():
                base = score(model if reference is None else reference)
        with torch.no_grad():
            w = (start - mu).exp()
            geometric = float((start - mu).mean().exp())
            left = float((mu - now).mean())
        keep = near = 1.0
        if algorithm.sequence_mask is not None:
            keep = float(algorithm.sequence_mask[0] <= geometric <= algorithm.sequence_mask[1])
        if algorithm.negative_mask is not None and advantage < 0 and left > algorithm.negative_mask:
            near = 0.0
        for t in range(length):
            log_ratio = now[t] - anchor[t]
            ratio = log_ratio.exp()
            if algorithm.ratio == "sequence":
                ratio = (now - anchor).mean().exp()
            if algorithm.objective == "cispo":
                cap = 1 + algorithm.clip_high
                objective = min(float(ratio.detach()), cap) * advantage * now[t]
            elif algorithm.objective == "dppo_tv":
                moved = float(now[t].detach().exp() - anchor[t].exp())
                outside = moved > algorithm.clip_high if advantage > 0 else False
                outside = outside or (advantage < 0 and moved < -algorithm.clip_low)
                objective = ratio * advantage * (0.0 if outside else 1.0)
            else:
                clipped = ratio.clamp(1 - algorithm.clip_low, 1 + algorithm.clip_high)
                objective = torch.minimum(ratio * advantage, clipped * advantage)
                if algorithm.dual_clip is not None and advantage < 0:
                    objective = objective.clamp(min=algorithm.dual_clip * advantage)
            objective = near * objective
            if algorithm.kl_coef and algorithm.kl_in == "loss":
                d = now[t] - base[t]
                if algorithm.kl_estimator == "k3":
                    penalty = log_ratio.exp() * ((-d).exp() - 1 + d)
                else:
                    penalty = log_ratio.detach().exp() * d**2 / 2
                objective = objective - algorithm.kl_coef * penalty
            weight = keep
            if algorithm.correction == "truncate":
                weight *= min(float(w[t]), algorithm.correction_cap)
            elif algorithm.correction == "mask":
                inside = algorithm.correction_low <= float(w[t]) <= algorithm.correction_cap
                weight *= float(w[t]) if inside else 0.0
            divisor = {
                "token": sum(lengths),
                "sequence": len(lengths) * length,
                "prompt": len(by_prompt) * by_prompt[prompt],
                "constant": sampled * max_tokens,
            }[algorithm.aggregation]
            loss = loss - weight * objective / divisor
    return loss
