"""The stages that look at folders: run.dir with its checkpoint, the model with its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cohort.actors.engine import stop_token_ids
from cohort.cluster.adapter_folder import trained_parameters
from cohort.cluster.commands.check.estimate import Architecture
from cohort.cluster.commands.check.stages import Stage
from cohort.cluster.config import Config
from cohort.cluster.continuing import Saved
from cohort.cluster.files import require_writable
from cohort.cluster.model_folder import inspect_model, load_tokenizer
from cohort.cluster.run_dir import find_run_dir
from cohort.cluster.weight_files import weight_files
from cohort.learner.checkpoint import latest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Model:
    """A model that could be read.

    Attributes:
        path: A local folder or a hub id.
        context: Its longest sequence, in tokens.
        parameters: How many numbers it has.
        tokenizer: Its tokenizer.
        architecture: Its sizes; None where its config lacks those that every decoder has.
        trained: How many numbers its adapters have; None: all of the model's are trained.
    """

    path: str
    context: int
    parameters: int
    tokenizer: PreTrainedTokenizerBase
    architecture: Architecture | None
    trained: int | None = None


def check_run_dir(config: Config, stage: Stage) -> Saved | None:
    """Whether training may use run.dir, and the checkpoint it would go on from."""
    folder = find_run_dir(config)
    require_writable(folder, f"run.dir={folder}")
    checkpoint = latest(folder / "checkpoints") if config.run.resume else None
    if checkpoint is None:
        new = "has no complete checkpoint: starts at step 0" if config.run.resume else "can be used"
        stage.say(f"{folder} {new}")
        return None
    saved = Saved.load(checkpoint)
    stage.say(f"{folder} goes on after step {saved.step} of {config.run.steps}")
    if saved.step >= config.run.steps:
        stage.warn(f"nothing is left to do: raise run.steps above {saved.step}")
    return saved


def check_model(config: Config, stage: Stage) -> Model:
    """Architecture, weights (their headers only), tokenizer, end of sequence."""
    path, context, parameters = inspect_model(config)
    stage.say(
        f"{path}: {parameters / 1e6:,.1f} million parameters, {config.model.precision}, context "
        f"{context:,}"
    )
    if (trained := trained_parameters(config, path)) is not None:
        stage.say(f"model.lora: {trained / 1e6:,.2f} million of adapters are trained")
    if Path(path).is_dir():
        stage.say(weight_files(Path(path)).describe())
    tokenizer = load_tokenizer(path)
    stops = stop_token_ids(path, tokenizer.eos_token_id)
    names = ", ".join(f"{tokenizer.convert_ids_to_tokens(i)} ({i})" for i in stops)
    template = "a chat template" if tokenizer.chat_template else "no chat template"
    stage.say(f"tokenizer: {len(tokenizer):,} tokens, {template}; completions end with {names}")
    if not stops:
        stage.warn(
            f"model.path={path}: neither the tokenizer nor config.json names an end-of-sequence "
            "token, so every completion runs to actors.max_tokens: set eos_token_id there"
        )
    return Model(path, context, parameters, tokenizer, read_architecture(path), trained)


def read_architecture(path: str) -> Architecture | None:
    """The sizes in a model's config.json; None where it lacks those that every decoder has."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path).get_text_config()
    sizes = config.to_dict()
    try:
        # Attributes, because transformers maps the names of older architectures onto these.
        layers, hidden, heads = (
            config.num_hidden_layers,
            config.hidden_size,
            config.num_attention_heads,
        )
    except AttributeError:
        return None
    return Architecture(
        layers=layers,
        hidden=hidden,
        intermediate=sizes.get("intermediate_size") or 4 * hidden,
        heads=heads,
        kv_heads=sizes.get("num_key_value_heads") or heads,
        head=sizes.get("head_dim") or hidden // heads,
        vocabulary=sizes["vocab_size"],
    )
