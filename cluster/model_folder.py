"""The checks of a model folder, so that faults show before engines start.

No weights are read and no code that comes with a model is run. Every fault is a RunError that names
the file or the config key; `cohort check`, `train`, `eval` and `warmup` report the same ones.
"""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING

from cohort.cluster.config import Config, expand
from cohort.cluster.errors import RunError, in_words
from cohort.cluster.weight_files import adapter, compare_with_model, read_object, weight_files
from cohort.learner.checkpoint import HF_FOLDER, is_complete, latest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# Names of the longest sequence in config.json, the usual one first.
CONTEXT_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "seq_length",
    "context_length",
    "n_ctx",
)
# Heads that give numbers, classes or single words instead of a next token.
OTHER_HEADS = (
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForQuestionAnswering",
    "ForMultipleChoice",
    "ForMaskedLM",
    "ForPreTraining",
    "RewardModel",
)
TOKENIZER_FILES = ("tokenizer.json", "*.model", "vocab.*", "*.tiktoken", "tekken.json")
# Read before anything is loaded, because loaders do not name the broken one.
JSON_FILES = ("config.json", "generation_config.json", "tokenizer_config.json")
MORE_JSON_FILES = ("tokenizer.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
# A tokenizer's names for the placeholders of other inputs than text.
NOT_TEXT = ("image_token", "audio_token", "video_token")


def inspect_model(config: Config) -> tuple[str, int, int]:
    """Check the model that model.path names.

    Returns:
        The local path or hub id, the context length in tokens, the number of parameters.

    Raises:
        RunError: It cannot be trained.
    """
    path, local = _locate(config.model.path)
    if local:
        _check_files(Path(path))
    found = _read_config(path)
    _refuse_other_kinds(path, found)
    model = _empty_model(path, found)
    shapes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    if local:
        compare_with_model(Path(path), weight_files(Path(path)), shapes)
    return path, _context(config, found), sum(shapes.values())


def starting_weights(config: Config) -> Path | None:
    """The folder with the weights that model.init_from names; None: those of model.path.

    Raises:
        RunError: There is none, or it is of another model than model.path.
    """
    if config.model.init_from is None:
        return None
    key = f"model.init_from={config.model.init_from}"
    folder = starting_folder(key, expand(config.model.init_from), HF_FOLDER)
    if not (folder / "config.json").is_file():
        only = adapter(folder) if (folder / "adapter_config.json").is_file() else ""
        instead = f"{only}, or set model.lora to train it" if only else ""
        raise RunError(f"{key}: no run directory, checkpoint or folder with a config.json{instead}")
    path, _ = _locate(config.model.path)
    own, other = (_shapes(empty_model(name)) for name in (path, str(folder)))
    different = sorted(
        name for name in own.keys() | other.keys() if own.get(name) != other.get(name)
    )
    if different:
        raise RunError(
            f"{key}: another model than model.path={config.model.path}: {different[0]} is "
            f"{other.get(different[0])} there and {own.get(different[0])} here"
        )
    try:
        sizes = {name: math.prod(shape) for name, shape in other.items()}
        compare_with_model(folder, weight_files(folder), sizes)
    except RunError as error:
        raise RunError(f"{key}: {error}") from error
    return folder.resolve()


def starting_folder(key: str, given: Path, inside: str) -> Path:
    """The folder `inside` a checkpoint, or a run's newest one; else the folder that is given.

    Args:
        key: The key of the config with its value, for messages.
        given: Where it points to.
        inside: The name of the folder in a checkpoint.

    Raises:
        RunError: There is no complete checkpoint.
    """
    folder = given
    if (folder / "checkpoints").is_dir():
        newest = latest(folder / "checkpoints")
        if newest is None:
            raise RunError(f"{key}: the run has no complete checkpoint")
        folder = newest
    if not (folder / HF_FOLDER / "config.json").is_file():
        return folder
    if not is_complete(folder):
        raise RunError(f"{key}: the checkpoint is not complete")
    return folder / inside


def empty_model(path: str) -> PreTrainedModel:
    """The model of a folder or hub id on the meta device. Raises RunError if there is none."""
    return _empty_model(path, _read_config(path))


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model's folder or hub id.

    Raises:
        RunError: There is none, it is broken, or it has tokens that the model has not.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import AutoTokenizer

    folder = Path(path)
    if folder.is_dir() and not any(any(folder.glob(name)) for name in TOKENIZER_FILES):
        raise RunError(
            f"model.path={path}: the folder holds no tokenizer ({', '.join(TOKENIZER_FILES)}): "
            "copy that of the model it comes from"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        for name in MORE_JSON_FILES:
            if (folder / name).is_file():
                read_object(folder / name)
        raise RunError(
            f"model.path={path}: its tokenizer cannot be loaded: {in_words(error)}"
        ) from error
    _check_vocabulary(path, tokenizer)
    return tokenizer


def vocabulary_size(path: str) -> int | None:
    """The number of token ids that the model has an embedding for."""
    size = _read_config(path).get_text_config().to_dict().get("vocab_size")
    return size if isinstance(size, int) else None


def _locate(given: str) -> tuple[str, bool]:
    """The folder's path or the hub id, and whether it is a folder."""
    folder = expand(given)
    if folder.is_file():
        hint = ""
        if folder.suffix == ".gguf":
            hint = " of GGUF: train from the model's unquantized folder"
        raise RunError(f"model.path={given}: a file{hint}; name the folder that holds config.json")
    if folder.is_dir():
        return str(folder.resolve()), True
    if given.startswith(("/", "~", ".", "$")) or given.count("/") != 1:
        raise RunError(f"model.path={given}: there is no such folder")
    return given, False


def _check_files(folder: Path) -> None:
    """Raise RunError for a folder without a model, and for files that are not JSON."""
    if not (folder / "config.json").is_file():
        only = adapter(folder) if (folder / "adapter_config.json").is_file() else ""
        inside = sorted(found.parent.name for found in folder.glob("*/config.json"))
        hint = f"; {', '.join(inside[:3])} inside does" if inside else ""
        raise RunError(f"model.path={folder}: the folder holds no config.json{only or hint}")
    for name in JSON_FILES:
        if (folder / name).is_file():
            ends = read_object(folder / name).get("eos_token_id")
            ids = ends if isinstance(ends, list) else [ends]
            if not all(end is None or type(end) is int for end in ids):
                raise RunError(
                    f"model.path: {folder / name}: eos_token_id must be a token id or a list of "
                    f"them, not {ends!r}"
                )


def _read_config(path: str) -> PreTrainedConfig:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        if not Path(path).is_dir():
            raise RunError(
                f"model.path={path}: there is no such folder here, and as a hub id it cannot be "
                f"loaded: {in_words(error)}"
            ) from error
        file = Path(path) / "config.json"
        known = read_object(file)
        if "auto_map" in known:
            raise RunError(
                f"model.path: {file}: the model comes with Python code of its own (auto_map), "
                "which is not run: transformers must know the architecture itself"
            ) from error
        kind = known.get("model_type")
        named = f"model_type={kind!r} " if kind else "no model_type, "
        raise RunError(
            f"model.path: {file} ({named}architectures={known.get('architectures')}) is not "
            f"understood by transformers: {in_words(error)}"
        ) from error


def _refuse_other_kinds(path: str, found: PreTrainedConfig) -> None:
    """Raise RunError for models that generate no text, or whose weights cannot be trained."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )

    sizes = found.to_dict()
    text = found.get_text_config().to_dict()
    quantized = sizes.get("quantization_config") or text.get("quantization_config")
    if quantized:
        method = quantized.get("quant_method") or "an unknown method"
        raise RunError(
            f"model.path={path}: config.json says that the weights are quantized ({method}): train "
            "from the model's unquantized weights; actors.quantization and learner.float8 compute "
            "with fewer bits"
        )
    names = sizes.get("architectures") or []
    heads = [name for name in names if str(name).endswith(OTHER_HEADS)]
    if heads:
        raise RunError(
            f"model.path={path}: a {heads[0]} (a reward model, a classifier or an encoder) cannot "
            "be trained to write text: its architecture must be ...ForCausalLM"
        )
    if sizes.get("is_encoder_decoder") or (
        found.model_type in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
        and not any(str(name).endswith("ForCausalLM") for name in names)
    ):
        raise RunError(
            f"model.path={path}: {found.model_type} has an encoder and a decoder; only decoders "
            "(...ForCausalLM) can be trained here"
        )
    if found.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and sizes.get("is_decoder") is False:
        raise RunError(
            f"model.path={path}: {found.model_type} is an encoder, which writes no text; only "
            "decoders (...ForCausalLM) can be trained here"
        )


def _empty_model(path: str, found: PreTrainedConfig) -> PreTrainedModel:
    """The model on the meta device: shapes without memory. Raises RunError if there is none."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    # transformers imports torchao, which warns about its own parts for GPUs.
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if type(found) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise RunError(
            f"model.path={path}: {found.model_type} is not a language model that transformers "
            "can generate text with (AutoModelForCausalLM does not know it)"
        )
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(found, trust_remote_code=False)
        model.tie_weights()
    except Exception as error:
        raise RunError(
            f"model.path={path}: no model can be made of its config.json: {in_words(error)}"
        ) from error
    return model


def _context(config: Config, found: PreTrainedConfig) -> int:
    """The longest sequence in tokens; model.max_length where the model names none."""
    sizes = found.get_text_config().to_dict()
    for key in CONTEXT_KEYS:
        if isinstance(size := sizes.get(key), int) and size > 0:
            return size
    if config.model.max_length is None:
        raise RunError(
            f"model.path={config.model.path}: config.json does not say how long a sequence may "
            f"be ({found.model_type} has no key for it): set model.max_length to the tokens of "
            "prompt plus completion"
        )
    return config.model.max_length


def _check_vocabulary(path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise RunError for a tokenizer with ids that the model has no embedding for."""
    size = vocabulary_size(path)
    if size is None:
        return
    beyond = {token: number for token, number in tokenizer.get_vocab().items() if number >= size}
    # Gemma 3's text models share the tokenizer of those for images.
    unused = {str(tokenizer.special_tokens_map.get(name)) for name in NOT_TEXT}
    wrong = sorted((number, token) for token, number in beyond.items() if token not in unused)
    if wrong:
        shown = ", ".join(f"{token!r} ({number})" for number, token in wrong[:3])
        raise RunError(
            f"model.path={path}: the tokenizer has token ids up to {wrong[-1][0]} ({shown}), and "
            f"the model embeds {size}: they do not belong together. Were tokens added? Then save "
            "the model after resize_token_embeddings"
        )
