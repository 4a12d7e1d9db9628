"""Tiny models and groups, and the slow, obvious GRPO step that the learner is held against."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from actors.records import Completion, Group, GroupMeta, Prompt, ScoredGroup, ScoreMeta
from learner.batch import ScoredRef

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
    meta = GroupMeta(
        group_id=group.group.id,
        prompt_tokens=len(group.group.prompt.token_ids),
        completion_ids=tuple(c.id for c in completions),
        completion_tokens=tuple(len(c.token_ids) for c in completions),
        truncated=tuple(c.finish_reason == "length" for c in completions),
        weight_versions=(0, 0),
        actor="a",
        seconds=0.0,
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


def reference_loss(
    model: Any,
    groups: list[ScoredGroup],
    *,
    temperature: float,
    aggregation: str = "token",
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    max_tokens: int = 32,
) -> torch.Tensor:
    """GRPO as in the papers, one token at a time; zero-variance groups are left out."""
    trained: list[tuple[ScoredGroup, int, float]] = []
    for group in groups:
        valid = [r for r in group.totals if r is not None]
        if len(set(valid)) < 2:
            continue
        mean = sum(valid) / len(valid)
        std = math.sqrt(sum((r - mean) ** 2 for r in valid) / len(valid))
        trained += [
            (group, i, (r - mean) / std) for i, r in enumerate(group.totals) if r is not None
        ]
    lengths = [len(group.group.completions[i].token_ids) for group, i, _ in trained]
    loss = torch.zeros(())
    for (group, i, advantage), length in zip(trained, lengths, strict=True):
        completion = group.group.completions[i]
        now = reference_logprobs(
            model, group.group.prompt.token_ids, completion.token_ids, temperature
        )
        for t in range(length):
            ratio = (now[t] - float(completion.logprobs[t])).exp()
            clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
            objective = torch.minimum(ratio * advantage, clipped * advantage)
            divisor = {
                "token": sum(lengths),
                "sequence": len(lengths) * length,
                "constant": len(lengths) * max_tokens,
            }[aggregation]
            loss = loss - objective / divisor
    return loss
