"""Parts of writing a checkpoint: the Hugging Face folder, and errors that wait for all ranks."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from cohort.learner.checkpoint import DRIVER_WAS_HERE, CheckpointError, NotFiniteError

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


def write_model(model: Any, state: dict[str, Any], model_folder: Path, target: Path) -> None:
    """Write a Hugging Face folder: config, these weights, tokenizer and what else goes with them.

    transformers refuses to write generation settings that contradict one another, which it reads
    without a word. They are no part of training: a folder's own are copied as they are.
    """
    if model.can_generate():
        settings = model.generation_config
        own = (model_folder / GENERATION_CONFIG).is_file()
        model.generation_config = _plain_settings(settings, own)
        try:
            model.save_pretrained(target, state_dict=state)
        finally:
            model.generation_config = settings
    else:
        model.save_pretrained(target, state_dict=state)
    for pattern in COMPANION_FILES:
        for file in model_folder.glob(pattern):
            if file.is_file():
                shutil.copy(file, target / file.name)


def _plain_settings(settings: Any, replaced: bool) -> Any:
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
    model: Any, model_folder: Path, trial: Path, rank: int, wait_s: float = SEEN_S
) -> None:
    """Write everything but the weights into the driver's trial folder, before anything is trained.

    Raises CheckpointError when that fails, or this rank does not see the driver's folder.
    """
    import torch

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


def require_finite(model: Any, device: Any) -> None:
    """Raise NotFiniteError, on every rank, unless all weights of all ranks are finite."""
    import torch
    import torch.distributed as dist

    finite = torch.ones(1, device=device)
    for parameter in model.parameters():
        # ZeRO-3 leaves each rank its own part there.
        held = parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter
        if not bool(held.detach().isfinite().all()):
            finite.zero_()
            break
    dist.all_reduce(finite, dist.ReduceOp.MIN)
    if not bool(finite):
        raise NotFiniteError("the weights hold a NaN or an infinity, and are not saved")


class Writing:
    """Keeps errors of writing files until every rank is through with what all ranks do together.

    A rank that left at once would leave the others waiting for it for good, and the learner lost.
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

    def agree(self, device: Any) -> None:
        """Raise CheckpointError on every rank if any could not write."""
        import torch
        import torch.distributed as dist

        fine = torch.full((1,), float(self.error is None), device=device)
        dist.all_reduce(fine, dist.ReduceOp.MIN)
        if self.error is not None:
            raise CheckpointError(f"{type(self.error).__name__}: {self.error}") from self.error
        if not bool(fine):
            raise CheckpointError("another rank could not write its part")


class PatientEngine:
    """DeepSpeed's writer of checkpoint files, whose errors wait until all ranks are through."""

    def __init__(self, engine: Any) -> None:
        self._deepspeed = engine
        self._wrapped = engine.checkpoint_engine
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

    def save(self, state_dict: Any, path: str) -> None:
        with self._writing.kept():
            self._wrapped.save(state_dict, path)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)
