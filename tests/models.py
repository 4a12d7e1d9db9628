"""Tiny random models with a real tokenizer, small enough to build in a second.

Two layers, hidden size 64, two heads of 32 (a head size that every attention kernel takes), a
byte-level BPE of 384 tokens or fewer with a ChatML template.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

END, PAD = "<|im_end|>", "<|pad|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MAX_LENGTH = 1024
# Wider than the usual 0.02, so that log-probs differ enough between tokens to be compared.
SPREAD = 0.1


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on sums: every text has tokens, and comes back as it was."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [
        f"What is {a} + {b}? Reply with the number only. {a + b}\n"
        for a in range(20)
        for b in range(20)
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        # Qwen2's tokenizer class adds the last one where it is missing.
        special_tokens=[PAD, "<|im_start|>", END, "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )


def _llama_config(tokenizer: PreTrainedTokenizerFast, **given: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=SPREAD,
        **_special_tokens(tokenizer),
        **given,
    )


def tiny_llama(
    folder: Path, *, tied: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Path:
    """A Llama with two key-value heads, embeddings tied to the head or not."""
    tokenizer = tiny_tokenizer()
    config = _llama_config(tokenizer, tie_word_embeddings=tied)
    torch.manual_seed(seed)
    return _save(LlamaForCausalLM(config), tokenizer, folder, dtype)


def tiny_reward_model(folder: Path, *, seed: int = 0) -> Path:
    """A Llama that ends in one number, in float32."""
    tokenizer = tiny_tokenizer()
    config = _llama_config(tokenizer, num_labels=1)
    torch.manual_seed(seed)
    return _save(LlamaForSequenceClassification(config), tokenizer, folder, torch.float32)


def tiny_qwen2(
    folder: Path, *, tied: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Path:
    """A Qwen2: biases in the attention, one key-value head for two query heads."""
    tokenizer = tiny_tokenizer()
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=tied,
        initializer_range=SPREAD,
        **_special_tokens(tokenizer),
    )
    torch.manual_seed(seed)
    return _save(Qwen2ForCausalLM(config), tokenizer, folder, dtype)


def tiny_gpt2(folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """A GPT-2: learned positions, transposed weights, names without the `model.` prefix."""
    tokenizer = tiny_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=64,
        n_layer=2,
        n_head=2,
        n_positions=MAX_LENGTH,
        initializer_range=SPREAD,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **_special_tokens(tokenizer),
    )
    torch.manual_seed(seed)
    return _save(GPT2LMHeadModel(config), tokenizer, folder, dtype)


def _special_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, int | None]:
    return {
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path, dtype: torch.dtype
) -> Path:
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
