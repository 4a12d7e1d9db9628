"""Model folders of every kind: the good ones are known, the others are refused in words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from cohort.cluster import model_folder
from cohort.cluster.commands.check.model import check_model
from cohort.cluster.commands.check.stages import CheckReport
from cohort.cluster.config_file import load_config
from cohort.cluster.errors import RunError
from cohort.cluster.model_folder import inspect_model, load_tokenizer
from cohort.cluster.prepare import prepare
from tests.models import tiny_reward_model, tiny_tokenizer

Change = Callable[[Path], object]
SMALL = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": 384, "n_embd": 64, "n_layer": 2, "n_head": 2, "bos_token_id": 2,
        "eos_token_id": 2}  # fmt: skip
MAMBA = {"vocab_size": 384, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 4}
VISION = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
          "intermediate_size": 32, "image_size": 28, "patch_size": 14}  # fmt: skip
TEXT = {**SMALL, "max_position_embeddings": 512}

# Config class, its arguments, the context that it says.
KNOWN: list[tuple[str, dict[str, Any], int]] = [
    ("LlamaConfig", TEXT, 512),
    ("Qwen2Config", TEXT, 512),
    ("Qwen3Config", TEXT, 512),
    ("Gemma2Config", TEXT, 512),
    ("Gemma3TextConfig", TEXT, 512),
    ("Gemma3Config", {"text_config": TEXT, "vision_config": VISION}, 512),
    ("MistralConfig", TEXT, 512),
    ("Phi3Config", TEXT, 512),
    ("GPTNeoXConfig", {k: v for k, v in TEXT.items() if "key_value" not in k}, 512),
    ("GPT2Config", {**GPT2, "n_positions": 256}, 256),
    ("MptConfig", {"vocab_size": 384, "d_model": 64, "n_heads": 2, "n_layers": 2,
                   "max_seq_len": 128}, 128),
]  # fmt: skip


def config(path: Path | str, **keys: Any) -> Any:
    given = [f"{name.replace('__', '.')}={value}" for name, value in keys.items()]
    return load_config(None, [f"model.path={path}", "model.dtype=float32", *given])


def saved(folder: Path, name: str, arguments: dict[str, Any]) -> Path:
    """A model of a transformers config class, with a tokenizer."""
    found = getattr(transformers, name)(**arguments)
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(found).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def edited(file: Path, **values: Any) -> None:
    known = json.loads(file.read_text())
    known |= values
    file.write_text(json.dumps({k: v for k, v in known.items() if v is not None}))


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of a good folder, to be broken."""
    return shutil.copytree(tiny_model, tmp_path / "model")


@pytest.mark.parametrize(("name", "arguments", "context"), KNOWN, ids=[k[0] for k in KNOWN])
def test_architectures_are_known_by_their_own_config_classes(
    tmp_path: Path, name: str, arguments: dict[str, Any], context: int
) -> None:
    folder = saved(tmp_path / "model", name, arguments)
    path, found, parameters = inspect_model(config(folder))
    assert (path, found) == (str(folder), context)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert parameters == sum(p.numel() for p in model.parameters())
    assert load_tokenizer(path).eos_token_id == 2


@pytest.mark.parametrize("name", ["MambaConfig", "BloomConfig"])
def test_models_without_a_longest_sequence_need_max_length(tmp_path: Path, name: str) -> None:
    arguments = MAMBA if name == "MambaConfig" else {"vocab_size": 384, "hidden_size": 64,
                                                     "n_layer": 2, "n_head": 2}  # fmt: skip
    folder = saved(tmp_path / "model", name, arguments)
    with pytest.raises(RunError, match=r"does not say how long a sequence.*set model\.max_length"):
        inspect_model(config(folder))
    assert inspect_model(config(folder, model__max_length=300))[1] == 300


# Folders that are refused -------------------------------------------------------------------------


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def only(folder: Path, name: str, text: str = "x") -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_text(text)


def shards(folder: Path, missing: str = "", wrong: str = "") -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    index = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({n: weights[n] for n in part}, folder / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    if wrong:
        index["model.norm.weight"] = next(f for f in index.values()
                                          if f != index["model.norm.weight"])  # fmt: skip
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    if missing:
        (folder / missing).unlink()


def packed(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name] = weights[name].to(torch.uint8)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def without(folder: Path, *patterns: str) -> None:
    for pattern in patterns:
        for file in folder.glob(pattern):
            file.unlink()


def adapter_only(folder: Path) -> None:
    without(folder, "config.json", "model.safetensors")
    (folder / "adapter_model.safetensors").write_text("x")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')


def added(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.save_pretrained(folder)


def in_config(**values: Any) -> Change:
    return lambda folder: edited(folder / "config.json", **values)


QUANTIZED = {"quant_method": "bitsandbytes", "load_in_4bit": True}
BROKEN: dict[str, tuple[Change, str]] = {
    "config.json not JSON": (
        lambda f: (f / "config.json").write_text('{"model_type": "llama",'),
        r"config\.json is not JSON",
    ),
    "config.json a list": (
        lambda f: (f / "config.json").write_text("[]"),
        r"config\.json must hold an object, not list",
    ),
    "config.json not UTF-8": (
        lambda f: (f / "config.json").write_bytes(b"\xff\xfe{}"),
        r"config\.json is not JSON",
    ),
    "config.json nested": (
        lambda f: (f / "config.json").write_text("[" * 100_000),
        r"config\.json is not JSON",
    ),
    "no config.json": (lambda f: (f / "config.json").unlink(), "holds no config.json"),
    "generation_config.json not JSON": (
        lambda f: (f / "generation_config.json").write_text('{"temperature": 0.6,,}'),
        r"generation_config\.json is not JSON",
    ),
    "tokenizer_config.json not JSON": (
        lambda f: (f / "tokenizer_config.json").write_text("{"),
        r"tokenizer_config\.json is not JSON",
    ),
    "tokenizer.json not JSON": (
        lambda f: cut(f / "tokenizer.json"),
        r"tokenizer\.json is not JSON",
    ),
    "an end of text in words": (
        lambda f: edited(f / "generation_config.json", eos_token_id="</s>"),
        r"generation_config\.json: eos_token_id must be a token id",
    ),
    "unknown architecture": (
        in_config(model_type="llama99", architectures=["Llama99ForCausalLM"]),
        r"model_type='llama99'.*is not understood",
    ),
    "no model_type": (in_config(model_type=None), r"config\.json \(no model_type"),
    "code of its own": (
        in_config(model_type="mine", auto_map={"AutoConfig": "mine.MineConfig"}),
        r"Python code of its own \(auto_map\), which is not run",
    ),
    "a size in words": (in_config(hidden_size="many"), r"model\.path"),
    "a size that does not divide": (in_config(num_attention_heads=3), r"model\.path"),
    "4 bits": (
        in_config(quantization_config=QUANTIZED),
        r"quantized \(bitsandbytes\).*unquantized",
    ),
    "gptq": (in_config(quantization_config={"quant_method": "gptq", "bits": 4}), r"\(gptq\)"),
    "awq": (in_config(quantization_config={"quant_method": "awq"}), r"\(awq\)"),
    "packed weights": (packed, r"up_proj\.weight in .*model\.safetensors is quantized \(U8\)"),
    "cut short": (
        lambda f: cut(f / "model.safetensors"),
        r"model\.safetensors is not a whole safetensors file",
    ),
    "empty": (
        lambda f: (f / "model.safetensors").write_bytes(b""),
        r"model\.safetensors is not a whole safetensors file",
    ),
    "Git LFS": (
        lambda f: (f / "model.safetensors").write_text("version https://git-lfs.github.com\n"),
        r"model\.safetensors is not a whole safetensors file",
    ),
    "no weights": (
        lambda f: (f / "model.safetensors").unlink(),
        r"there is no model\.safetensors",
    ),
    "a missing shard": (
        lambda f: shards(f, missing="model-00002-of-00002.safetensors"),
        r"model-00002-of-00002\.safetensors missing",
    ),
    "a wrong index": (lambda f: shards(f, wrong="yes"), r"lacks model\.norm\.weight"),
    "a broken index": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {'),
        r"model\.safetensors\.index\.json is not JSON",
    ),
    "an index without a map": (
        lambda f: (f / "model.safetensors.index.json").write_text("{}"),
        r"index\.json has no weight_map",
    ),
    "GGUF": (lambda f: only(f, "model-Q4_0.gguf"), r"only model-Q4_0\.gguf.*unquantized"),
    "a broken .bin": (
        lambda f: only(f, "pytorch_model.bin", "version https://git-lfs"),
        r"pytorch_model\.bin is not a whole file of torch",
    ),
    "other files": (lambda f: only(f, "consolidated.00.pth"), r"only consolidated\.00\.pth"),
    "an adapter": (adapter_only, r"only an adapter.*org/base: merge"),
    "more layers than stored": (
        in_config(num_hidden_layers=3, layer_types=None),
        r"the files hold .* numbers, config\.json describes",
    ),
    "a smaller vocabulary than stored": (
        in_config(vocab_size=300),
        r"embed_tokens\.weight has .* do not belong together",
    ),
    "added tokens": (added, r"ids up to 326 \('<think>' \(325\).*embeds 325: they do not belong"),
    "no tokenizer": (
        lambda f: without(f, "tokenizer*", "special_tokens*", "*.jinja"),
        r"holds no tokenizer",
    ),
    "a classifier": (
        in_config(architectures=["LlamaForSequenceClassification"]),
        r"LlamaForSequenceClassification \(a reward model",
    ),
    "encoder and decoder": (
        in_config(model_type="t5", architectures=["T5ForConditionalGeneration"]),
        r"t5 has an encoder and a decoder",
    ),
    "BART": (
        in_config(model_type="bart", architectures=["BartForConditionalGeneration"]),
        r"bart has an encoder and a decoder",
    ),
    "an encoder": (
        in_config(model_type="bert", architectures=["BertModel"]),
        r"bert is an encoder",
    ),
    "vision": (
        in_config(model_type="vit", architectures=["ViTModel"]),
        r"vit is not a language model",
    ),
    "text and vision": (
        in_config(model_type="clip", architectures=["CLIPModel"]),
        r"clip is not a language model",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_bad_folder_is_one_message_that_names_it_in_every_command(
    folder: Path, what: str
) -> None:
    change, message = BROKEN[what]
    change(folder)
    # train, eval and warmup prepare alike.
    with pytest.raises(RunError, match=rf"(?s)model\.path.*{message}|{message}") as caught:
        prepare(config(folder))
    text = str(caught.value)
    assert str(folder) in text and "Traceback" not in text and len(text) < 900
    assert "\n" not in text
    lines: list[str] = []
    sheet = CheckReport(lines.append)
    with sheet.stage("model") as stage:
        check_model(config(folder), stage)
    assert sheet.conclude() == 1
    assert text.split(":")[0] in "\n".join(lines)


def test_a_reward_model_is_refused_as_a_policy(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="LlamaForSequenceClassification"):
        inspect_model(config(tiny_reward_model(tmp_path / "reward")))


def test_what_cannot_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.read_text

    def refuse(self: Path, *args: Any, **kwargs: Any) -> str:
        if self.name == "generation_config.json":
            raise PermissionError(13, "Permission denied")
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(RunError, match=r"generation_config\.json cannot be read: Permission den"):
        inspect_model(config(folder))


# Folders that are not what they seem, and can be used ---------------------------------------------


def test_shards_are_as_good_as_one_file(folder: Path) -> None:
    whole = inspect_model(config(folder))
    shards(folder)
    assert inspect_model(config(folder)) == whole


def test_weights_of_torch_are_taken(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    inspect_model(config(folder))


def test_contradictory_generation_settings_are_no_fault(folder: Path) -> None:
    edited(folder / "generation_config.json", do_sample=False, temperature=0.6, top_p=0.9)
    inspect_model(config(folder))
    load_tokenizer(str(folder))


def test_a_placeholder_of_images_may_lie_beyond_the_embedding(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<image_soft_token>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    with pytest.raises(RunError, match="do not belong together"):
        load_tokenizer(str(folder))
    edited(folder / "tokenizer_config.json", image_token="<image_soft_token>")
    load_tokenizer(str(folder))


# Names --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/no/such", "./no", "~/no-such-folder", "gpt2", "a/b/c"])
def test_a_folder_that_is_not_there(path: str) -> None:
    with pytest.raises(RunError, match="there is no such folder"):
        inspect_model(config(path))


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_text("x")
    with pytest.raises(RunError, match="a file of GGUF"):
        inspect_model(config(file))


def test_a_folder_above_the_model_is_told_where_it_is(folder: Path) -> None:
    with pytest.raises(RunError, match=r"holds no config\.json; model inside does"):
        inspect_model(config(folder.parent))


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError("We couldn't connect to 'https://huggingface.co'\nto load the files")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    with pytest.raises(RunError, match=r"org/name: .*no such folder.*as a hub id.*couldn't conn"):
        model_folder.inspect_model(config("org/name"))
