"""Saving and loading a rank's part of a checkpoint, and the policy as a Hugging Face folder."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from cohort.learner import reshape
from cohort.learner.adapter_files import whole_adapter, write_adapter
from cohort.learner.checkpoint import (
    ADAPTER_FOLDER,
    DRIVER_WAS_HERE,
    HF_FOLDER,
    LEARNER_FILE,
    CheckpointError,
    NotFiniteError,
    check_loadable,
    must_match,
    shape_of,
)
from cohort.learner.lora import take_trained
from cohort.learner.safe_load import only_data
from cohort.learner.state import CheckpointWriter, Engine, RankState, everywhere
from cohort.learner.weights import gather_named_weights

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

DEEPSPEED_FOLDER = "deepspeed"
DEEPSPEED_TAG = "state"
# A network file system may show a new file to other nodes only after a while.
SEEN_S = 30.0
GENERATION_CONFIG = "generation_config.json"
# What an engine or a plain transformers program needs beside the weights and config.json.
COMPANION_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "chat_template*",
    GENERATION_CONFIG,
)


def save(state: RankState, target: Path) -> None:
    """Write this rank's optimizer state; rank 0 also writes the Hugging Face folder.

    Args:
        state: This rank's.
        target: An existing folder that all ranks see.

    Raises:
        CheckpointError: On every rank, when any could not write or the weights are not finite.
    """
    require_finite(state.model, state.device)
    writing = write_engine(state, target / DEEPSPEED_FOLDER, DEEPSPEED_TAG)
    write_rest(state, target, writing)
    writing.agree(state.device)


def write_rest(state: RankState, target: Path, writing: Writing) -> None:
    """Write what a checkpoint has beside DeepSpeed's files: rank 0 does, the others take part.

    Args:
        state: This rank's.
        target: An existing folder.
        writing: Keeps the errors, for the ranks to agree on.
    """
    first = state.spec.rank == 0
    weights = _whole_weights(state)
    if first:
        with writing.kept():
            write_model(state.model, weights, state.model_folder, target / HF_FOLDER)
    if state.spec.lora is not None:
        adapter = whole_adapter(state)
        if first:
            with writing.kept():
                write_adapter(state, adapter, target / ADAPTER_FOLDER)
    if state.reference is not None and state.reference.refreshed:
        with writing.kept():
            state.reference.save(target, write=first)
    if first:
        counts = {"steps_done": state.steps_done, "updates_done": state.updates_done}
        facts = {**counts, **must_match(state.spec)}
        if state.reference is not None:
            facts["reference"] = state.reference.fingerprint
        if state.base is not None:
            facts["base"] = state.base
        with writing.kept():
            (target / LEARNER_FILE).write_text(json.dumps(facts, indent=1), encoding="utf-8")


def write_engine(state: RankState, folder: Path, tag: str) -> Writing:
    """Have DeepSpeed write what it holds, with the counts, into `folder`/`tag`.

    Frozen weights are left out: they come from the model folder again.

    Returns:
        The errors so far, for the ranks to agree on.
    """
    with PatientEngine(state.engine) as writing:
        try:
            state.engine.save_checkpoint(
                str(folder),
                tag=tag,
                client_state={"steps_done": state.steps_done, "updates_done": state.updates_done},
                save_latest=False,
                exclude_frozen_parameters=state.spec.lora is not None,
            )
        except OSError as error:
            # A script that DeepSpeed copies beside its files; the others wait at the end.
            writing.error = writing.error or error
            dist.barrier()
    return writing


def read_engine(state: RankState, folder: Path, tag: str) -> int:
    """Restore what `write_engine` wrote; returns the optimizer steps done."""
    path, counts = state.engine.load_checkpoint(
        str(folder),
        tag=tag,
        load_lr_scheduler_states=False,
        custom_load_fn=None if state.spec.lora is None else take_trained,
    )
    if path is None:
        raise CheckpointError(f"DeepSpeed found nothing to load in {folder / tag}")
    state.steps_done = int(counts["steps_done"])
    state.updates_done = int(counts["updates_done"])
    return state.steps_done


def export(state: RankState, target: Path) -> None:
    """Rank 0 writes the policy as a Hugging Face folder; the others take part in gathering it."""
    weights = _whole_weights(state)
    if state.spec.rank == 0:
        write_model(state.model, weights, state.model_folder, target)


def load(state: RankState, source: Path) -> int:
    """Restore weights, optimizer state and counts; returns the optimizer steps done.

    Raises:
        CheckpointError: Before anything is loaded, when the checkpoint was written by a learner of
            another shape, or with another reference or frozen model.
    """
    check_loadable(source, state.spec)
    facts = json.loads((source / LEARNER_FILE).read_text(encoding="utf-8"))
    own = None if state.reference is None else state.reference.fingerprint
    for what, mine in (("reference", own), ("base", state.base)):
        if mine is not None and facts.get(what) not in (None, mine):
            raise CheckpointError(
                f"{source} was written with another {what} than the model at "
                f"{state.model_folder}: set model.path to the model that the run started from"
            )
    if state.reference is not None:
        state.reference.load(source)
    ranks, stage = shape_of(source)
    with only_data(source):
        if (ranks, stage) == (state.spec.world_size, state.spec.learner.zero_stage):
            return read_engine(state, source / DEEPSPEED_FOLDER, DEEPSPEED_TAG)
        folder = source / DEEPSPEED_FOLDER / DEEPSPEED_TAG
        reshape.fill(state, reshape.gather(folder, ranks, stage))
    state.steps_done, state.updates_done = int(facts["steps_done"]), int(facts["updates_done"])
    return state.steps_done


def _whole_weights(state: RankState) -> dict[str, torch.Tensor]:
    """Rank 0: a copy of all weights in main memory, tied ones sharing theirs."""
    weights: dict[str, torch.Tensor] = {}
    copies: dict[int, torch.Tensor] = {}
    named = state.model.state_dict(keep_vars=True)
    for name, tensor in gather_named_weights(state.model, state.spec.learner.zero_stage):
        if state.spec.rank == 0:
            identity = id(named[name])
            if identity not in copies:
                copies[identity] = tensor.to("cpu", copy=True)
            weights[name] = copies[identity]
    return weights


def write_model(
    model: PreTrainedModel, weights: Mapping[str, torch.Tensor], model_folder: Path, target: Path
) -> None:
    """Write a Hugging Face folder: config, weights, tokenizer and what else belongs to them.

    transformers refuses to write generation settings that contradict one another, which it reads
    without complaint. Training does not use them: a folder's own are copied as they are.

    Args:
        model: The model, for its config.
        weights: By their Hugging Face names.
        model_folder: Where the model was loaded from; its tokenizer and settings are copied.
        target: The folder to write; made if needed.
    """
    if model.can_generate():
        settings = model.generation_config
        own = (model_folder / GENERATION_CONFIG).is_file()
        model.generation_config = _plain_settings(settings, own)
        try:
            model.save_pretrained(target, state_dict=weights)
        finally:
            model.generation_config = settings
    else:
        model.save_pretrained(target, state_dict=weights)
    for pattern in COMPANION_FILES:
        for file in model_folder.glob(pattern):
            if file.is_file():
                shutil.copy(file, target / file.name)


def _plain_settings(settings: GenerationConfig, replaced: bool) -> GenerationConfig:
    """Settings that transformers writes. replaced: they will be replaced by the folder's own.

    Without a file they come from config.json, where old models have sampling parameters, too.
    """
    from transformers import GenerationConfig

    if not replaced:
        try:
            settings.validate(strict=True)
        except ValueError:
            pass
        else:
            return settings
    return GenerationConfig(
        bos_token_id=settings.bos_token_id,
        eos_token_id=settings.eos_token_id,
        pad_token_id=settings.pad_token_id,
    )


def try_to_write(
    model: PreTrainedModel, model_folder: Path, trial: Path, rank: int, wait_s: float = SEEN_S
) -> None:
    """Write everything but the weights into the driver's trial folder, before anything is trained.

    Raises:
        CheckpointError: That fails, or this rank does not see the driver's folder within `wait_s`
            seconds.
    """
    until = time.monotonic() + wait_s
    while not (there := (trial / DRIVER_WAS_HERE).is_file()) and time.monotonic() < until:
        time.sleep(0.2)
    if not there:
        raise CheckpointError(
            f"{trial.parent}: learner rank {rank} does not see what the driver wrote there. "
            "run.dir must be on a file system that all of them share"
        )
    try:
        (trial / f"rank-{rank}").write_text("seen\n", encoding="utf-8")
        if rank == 0:
            write_model(model, {"trial": torch.zeros(1)}, model_folder, trial / "hf")
    except Exception as error:
        raise CheckpointError(
            f"a trial of saving the model {model_folder} in {trial.parent} failed; its checkpoints "
            f"would fail likewise. {type(error).__name__}: {error}"
        ) from error


def require_finite(model: torch.nn.Module, device: torch.device) -> None:
    """Raise NotFiniteError, on every rank, unless all weights of all ranks are finite."""
    # ZeRO-3 leaves each rank its own part in `ds_tensor`.
    held = (getattr(parameter, "ds_tensor", parameter) for parameter in model.parameters())
    finite = all(bool(tensor.detach().isfinite().all()) for tensor in held)
    if not everywhere(finite, device):
        raise NotFiniteError("the weights hold a NaN or an infinity, and are not saved")


class Writing:
    """Keeps errors of writing files until every rank is through with what all ranks do together.

    If a rank left at once, the others would hang, and the learner would be lost.
    """

    def __init__(self) -> None:
        self.error: Exception | None = None

    @contextmanager
    def kept(self) -> Iterator[None]:
        """A block that writes, and in which no other rank takes part."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - each library has its own for a full disk
            self.error = self.error or error

    def agree(self, device: torch.device) -> None:
        """Raise CheckpointError on every rank if any could not write."""
        fine = everywhere(self.error is None, device)
        if self.error is not None:
            raise CheckpointError(f"{type(self.error).__name__}: {self.error}") from self.error
        if not fine:
            raise CheckpointError("another rank could not write its part")


class PatientEngine:
    """DeepSpeed's writer of checkpoint files, whose errors wait until all ranks are through."""

    def __init__(self, engine: Engine) -> None:
        self._deepspeed = engine
        self._wrapped: CheckpointWriter = engine.checkpoint_engine
        self._writing = Writing()

    def __enter__(self) -> Writing:
        self._deepspeed.checkpoint_engine = self
        return self._writing

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._deepspeed.checkpoint_engine = self._wrapped

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        with self._writing.kept():
            self._wrapped.makedirs(path, exist_ok=exist_ok)

    def save(self, state_dict: object, path: str) -> None:
        with self._writing.kept():
            self._wrapped.save(state_dict, path)

    def __getattr__(self, name: str) -> object:
        return getattr(self._wrapped, name)
