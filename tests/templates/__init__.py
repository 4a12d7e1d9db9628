"""Tokenizers with the chat templates of the models that people train; see README.md."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Family:
    """A model family: its template (None: it has none), special tokens, and what prompts look like.

    opens: what stands between the question and the model's words; header: the same in front of an
    answer that the prompt begins. ends: what its completions end with.
    """

    name: str
    template: str | None
    bos: str | None
    eos: str
    pad: str | None
    others: tuple[str, ...]
    opens: str
    header: str
    ends: tuple[str, ...]
    arguments: tuple[tuple[str, Any], ...] = ()


CHATML = ("<|im_start|>", "<think>", "</think>")
LLAMA = ("<|start_header_id|>", "<|end_header_id|>", "<|end_of_text|>")
LLAMA_HEADER = "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
DEEPSEEK = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")
MISTRAL = ("[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
HARMONY = ("<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|call|>")
ASSISTANT = "<|im_end|>\n<|im_start|>assistant\n"

FAMILIES = (
    Family("qwen2.5", "qwen2_5", None, "<|im_end|>", "<|endoftext|>", CHATML, ASSISTANT, ASSISTANT,
           ("<|im_end|>", "<|endoftext|>")),
    Family("qwen3", "qwen3", None, "<|im_end|>", "<|endoftext|>", CHATML, ASSISTANT, ASSISTANT,
           ("<|im_end|>", "<|endoftext|>"), (("enable_thinking", False),)),
    Family("llama3", "llama3", "<|begin_of_text|>", "<|eot_id|>", None, LLAMA, LLAMA_HEADER,
           LLAMA_HEADER, ("<|eot_id|>", "<|end_of_text|>")),
    Family("llama3.1", "llama3_1", "<|begin_of_text|>", "<|eot_id|>", "<|finetune_right_pad_id|>",
           LLAMA, LLAMA_HEADER, LLAMA_HEADER, ("<|eot_id|>", "<|end_of_text|>"),
           (("date_string", "1 Jan 2026"),)),
    Family("gemma3", "gemma3", "<bos>", "<eos>", "<pad>", ("<start_of_turn>", "<end_of_turn>"),
           "<end_of_turn>\n<start_of_turn>model\n", "<end_of_turn>\n<start_of_turn>model\n",
           ("<eos>", "<end_of_turn>")),
    Family("mistral v1", "mistral_v1", "<s>", "</s>", None, MISTRAL, " [/INST]", " [/INST] ",
           ("</s>",)),
    Family("mistral v3", "mistral_v3_tekken", "<s>", "</s>", "<pad>", MISTRAL, "[/INST]",
           "[/INST]", ("</s>",)),
    Family("mistral v7", "mistral_v7_tekken", "<s>", "</s>", "<pad>", MISTRAL, "[/INST]",
           "[/INST]", ("</s>",)),
    Family("deepseek v3", "deepseekv3", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", None,
           DEEPSEEK, "<｜Assistant｜><think>\n", "<｜Assistant｜>", ("<｜end▁of▁sentence｜>",)),
    Family("deepseek r1", "deepseek_r1_distill", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>",
           None, DEEPSEEK, "<｜Assistant｜><think>\n", "<｜Assistant｜>",
           ("<｜end▁of▁sentence｜>",)),
    Family("gpt-oss", "gptoss", "<|startoftext|>", "<|return|>", "<|endoftext|>", HARMONY,
           "<|end|><|start|>assistant", "<|end|><|start|>assistant<|channel|>final<|message|>",
           ("<|return|>", "<|endoftext|>", "<|call|>"), (("reasoning_effort", "low"),)),
    Family("smollm2", "smollm2", "<|im_start|>", "<|im_end|>", "<|im_end|>", (), ASSISTANT,
           ASSISTANT, ("<|im_end|>",)),
    Family("gpt2", None, "<|endoftext|>", "<|endoftext|>", None, (), "", "", ("<|endoftext|>",)),
)  # fmt: skip


def tokenizer_of(family: Family, adds_bos: bool = True, appends: str | None = None) -> Any:
    """A byte-level tokenizer with the family's special tokens and template.

    adds_bos: to plain texts, as most tokenizers with one do. appends: a token after plain texts.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = [family.bos, family.eos, family.pad, *family.others, *family.ends, appends]
    names = list(dict.fromkeys(name for name in special if name))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*names, *alphabet])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(names)
    # GPT-2's tokenizer adds nothing, though it has a token for it.
    bos = family.bos if adds_bos and family.template not in (None, "smollm2") else None
    if bos or appends:
        used = [name for name in (bos, appends) if name]
        inner.post_processor = processors.TemplateProcessing(
            single=" ".join([*([bos] if bos else []), "$A", *([appends] if appends else [])]),
            special_tokens=[(name, vocabulary[name]) for name in dict.fromkeys(used)],
        )
    template = family.template and (FOLDER / f"{family.template}.jinja").read_text(encoding="utf-8")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token=family.bos,
        eos_token=family.eos,
        pad_token=family.pad,
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )
