"""Checkpoints that are either complete or ignored.

    checkpoints/
      tmp-40/            being written; moved aside at the next start
      best               a link to the checkpoint with the best evaluation, which is kept
      step-20/
        hf/              the policy as a Hugging Face folder, adapters merged into its weights
        adapter/         what model.lora has trained, alone, in PEFT's format
        deepspeed/       optimizer state, one part per rank
        learner.json     what the learner must have in common with the run that loads it
        state.json       the driver's own state
        manifest.json    size of every file above
        COMPLETE         written last

The folder is on a file system that all learner ranks and the driver see.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from cohort.actors.errors import CohortError
from cohort.actors.plain import JsonObject
from cohort.learner.aside import Aside
from cohort.learner.config import Dtype

if TYPE_CHECKING:
    from cohort.learner.lora_config import LoraConfig
    from cohort.learner.spec import LearnerSpec

LEARNER_FILE = "learner.json"
STATE = "state.json"
MANIFEST = "manifest.json"
COMPLETE = "COMPLETE"
HF_FOLDER = "hf"
ADAPTER_FOLDER = "adapter"
TRIAL = "tmp-trial"
BEST = "best"
DRIVER_WAS_HERE = "driver"


class CheckpointError(CohortError):
    """A checkpoint cannot be written, found or used; the message says which and why."""


class NotFiniteError(CheckpointError):
    """The weights hold a NaN or an infinity: they are not saved."""


class Checkpoints:
    """The checkpoint folder of one run. One process, the driver, uses it at a time.

    Args:
        folder: Made if needed.
        keep: Complete checkpoints that are kept.
        expected_bytes: About the size of one checkpoint.
        aside: Where incomplete checkpoints of an earlier start, and one that is in the way of
            another, are moved.
    """

    def __init__(
        self,
        folder: str | Path,
        keep: int,
        expected_bytes: int = 0,
        aside: Aside | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.keep = keep
        self.expected_bytes = expected_bytes
        self._aside = aside or Aside(self.folder.parent)
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(self.folder / TRIAL, ignore_errors=True)
        for leftover in self.folder.glob("tmp-*"):
            self._aside.move(leftover)

    def begin(self, step: int) -> Path:
        """A fresh folder for the ranks to write into; `commit` makes it a checkpoint.

        Raises:
            CheckpointError: It would not fit on the disk.
        """
        self.discard(step)
        self.require_space()
        temporary = self._temporary(step)
        temporary.mkdir()
        return temporary

    def discard(self, step: int) -> None:
        """Delete what was begun for a step."""
        shutil.rmtree(self._temporary(step), ignore_errors=True)

    def require_space(self, saves: int = 1) -> None:
        """Raise CheckpointError unless there is room for the next `saves` checkpoints.

        An old one is deleted only after a new one is complete: there is one more than `keep`.
        """
        there = sum(map(is_complete, _by_step(self.folder)))
        more = max(1, min(saves, self.keep + 1 - there))
        needed = more * self.expected_bytes
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            several = f", {more} of them {size_of(needed)}" if more > 1 else ""
            raise CheckpointError(
                f"{self.folder}: a checkpoint takes about {size_of(self.expected_bytes)}{several}, "
                f"and {size_of(free)} are free on this disk: make room there, lower "
                "run.keep_checkpoints, or choose another run.dir"
                + (f" ({self._aside.folder} may go)" if self._aside.folder else "")
            )

    @contextmanager
    def trial(self) -> Iterator[Path]:
        """A folder in which everything that saving does to files is tried, and then removed.

        Raises:
            CheckpointError: The folder cannot be written as a checkpoint is.
        """
        folder = self.folder / TRIAL
        try:
            folder.mkdir(exist_ok=True)
            _write(folder / "written", "by the driver\n")
            _sync(folder)
            os.rename(folder / "written", folder / DRIVER_WAS_HERE)
        except OSError as error:
            raise CheckpointError(
                f"{self.folder}: a checkpoint could not be written: {error}"
            ) from error
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def commit(self, step: int, state: Mapping[str, object]) -> Path:
        """Add the driver's state, make everything durable, give it its name, drop old ones.

        Args:
            step: As given to `begin`.
            state: JSON values; `load_state` returns them.

        Raises:
            CheckpointError: Nothing was written for this step.
        """
        temporary = self._temporary(step)
        if not temporary.is_dir() or not any(temporary.iterdir()):
            raise CheckpointError(f"nothing was written into {temporary}")
        _write(temporary / STATE, json.dumps(state, indent=1))
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        _write(temporary / MANIFEST, json.dumps(sizes_in(temporary), indent=1))
        for path in files:
            _sync(path)
        for path in (temporary, *temporary.rglob("*")):
            if path.is_dir():
                _sync(path)

        final = self.folder / f"step-{step}"
        if final.exists():
            # A torn one, or the same step of an earlier attempt.
            self._aside.move(final)
        os.rename(temporary, final)
        try:
            _sync(self.folder)
            _write(final / COMPLETE, "")
            _sync(final)
        except OSError:
            # No half checkpoint under a checkpoint's name: the caller may try again.
            (final / COMPLETE).unlink(missing_ok=True)
            os.rename(final, temporary)
            raise
        self.prune()
        return final

    def latest(self) -> Path | None:
        """The newest complete checkpoint."""
        return latest(self.folder)

    def steps(self) -> list[int]:
        """The steps of all complete checkpoints, in order."""
        return complete_steps(self.folder)

    def mark_best(self, step: int) -> None:
        """Have `best` point to the checkpoint of a step, which is kept from now on."""
        temporary = self.folder / f".{BEST}.tmp"
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(f"step-{step}")
        os.replace(temporary, self.folder / BEST)
        self.prune()

    def prune(self) -> None:
        """Delete all but the best and the newest `keep` complete checkpoints; move older torn ones
        aside."""
        complete = [path for path in _by_step(self.folder) if is_complete(path)]
        best = (self.folder / BEST).resolve().name
        for path in _by_step(self.folder):
            if path in complete[self.keep :]:
                if path.name == best:
                    continue
                # By another name first: a deletion that is cut short leaves no half checkpoint.
                os.rename(path, self.folder / f"gone-{_step(path)}")
            elif complete and path not in complete and _step(path) < _step(complete[0]):
                self._aside.move(path)
        for path in self.folder.glob("gone-*"):
            shutil.rmtree(path, ignore_errors=True)

    def _temporary(self, step: int) -> Path:
        return self.folder / f"tmp-{step}"


def size_of(count: int) -> str:
    """Bytes for people: `3.4 GiB`, `120.0 MiB`, `17 bytes`."""
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} bytes"


def sizes_in(folder: Path) -> dict[str, int]:
    """The size of every file in a folder and below it, by its path from there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def latest(folder: str | Path) -> Path | None:
    """The newest complete checkpoint in a checkpoint folder; torn ones are passed over."""
    return next((path for path in _by_step(Path(folder)) if is_complete(path)), None)


def complete_steps(folder: str | Path) -> list[int]:
    """The steps of all complete checkpoints in a checkpoint folder, in order."""
    return sorted(_step(path) for path in _by_step(Path(folder)) if is_complete(path))


def is_complete(checkpoint: str | Path) -> bool:
    """True when the marker is there and every file of the manifest has its size."""
    checkpoint = Path(checkpoint)
    if not (checkpoint / COMPLETE).is_file():
        return False
    try:
        sizes = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def load_state(checkpoint: str | Path) -> JsonObject:
    """The driver's state as it was given to `commit`."""
    return json.loads((Path(checkpoint) / STATE).read_text(encoding="utf-8"))


def must_match(spec: LearnerSpec) -> dict[str, object]:
    """What the learner that loads a checkpoint has in common with the one that wrote it."""
    return _shape(spec.world_size, spec.learner.zero_stage, spec.dtype, spec.lora)


def _shape(workers: int, zero_stage: int, dtype: str, lora: LoraConfig | None) -> dict[str, object]:
    return {
        "learner.workers": workers,
        "learner.zero_stage": zero_stage,
        "model.dtype": dtype,
        "model.lora": None if lora is None else lora.model_dump(mode="json"),
    }


def check_loadable(checkpoint: Path, spec: LearnerSpec) -> None:
    """Raise CheckpointError unless a learner of this spec can load the checkpoint."""
    check_shape(checkpoint, spec.world_size, spec.learner.zero_stage, spec.dtype, spec.lora)


def _learner_shape(checkpoint: Path) -> dict[str, Any]:
    file = checkpoint / LEARNER_FILE
    if not file.is_file():
        raise CheckpointError(f"{checkpoint} holds no learner state ({LEARNER_FILE} is missing)")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def check_shape(
    checkpoint: Path, workers: int, zero_stage: int, dtype: str, lora: LoraConfig | None = None
) -> None:
    """Raise CheckpointError unless a learner of this shape can load the checkpoint."""
    # Older ones trained all weights, and do not say so.
    found = {"model.lora": None, **_learner_shape(checkpoint)}
    # With ZeRO the state can be divided anew; without, and in another precision, it cannot.
    anew = zero_stage >= 1 and found["learner.zero_stage"] >= 1 and "updates_done" in found
    for key, wanted in _shape(workers, zero_stage, dtype, lora).items():
        if found[key] != wanted and (key.startswith("model.") or not anew):
            before, now = (x if isinstance(x, str) else json.dumps(x) for x in (found[key], wanted))
            new_run = f"model.init_from={checkpoint}"
            if key == "model.lora":
                new_run = f"model.path={checkpoint / HF_FOLDER}"
            raise CheckpointError(
                f"{checkpoint} was written with {key}={before}, this run has {key}={now}: "
                f"resume with {key}={before}, or start a new run from it with {new_run}"
            )


def shape_of(checkpoint: Path) -> tuple[int, int]:
    """The ranks and the ZeRO stage that wrote a checkpoint."""
    found = _learner_shape(checkpoint)
    return found["learner.workers"], found["learner.zero_stage"]


def dtype_of(checkpoint: Path) -> Dtype:
    """The precision, `model.dtype`, that a checkpoint was trained in.

    Raises:
        CheckpointError: It holds no learner's state.
    """
    return cast(Dtype, _learner_shape(checkpoint)["model.dtype"])


def export(run_dir: str | Path, out: str | Path, adapter: bool = False) -> Path:
    """Copy the Hugging Face folder of the newest complete checkpoint of a run to `out`.

    Args:
        run_dir: Of the run.
        out: The folder to make.
        adapter: Of a run with `model.lora`, only the adapter, in PEFT's format.

    Raises:
        CheckpointError: The run has none, or `out` exists and is not empty.
    """
    folder = Path(run_dir) / "checkpoints"
    checkpoint = latest(folder)
    if checkpoint is None:
        raise CheckpointError(f"no complete checkpoint in {folder}")
    source = checkpoint / (ADAPTER_FOLDER if adapter else HF_FOLDER)
    if not source.is_dir():
        raise CheckpointError(f"{checkpoint} holds no adapter: the run trained without model.lora")
    with new_folder(out) as temporary:
        shutil.copytree(source, temporary, dirs_exist_ok=True)
    return Path(out)


def nearest_existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(place for place in (path, *path.parents) if place.exists())


def require_free(out: str | Path) -> None:
    """Raise CheckpointError unless `out` can be made: it does not exist, or is an empty folder."""
    out = Path(out).absolute()
    parent = nearest_existing(out.parent)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise CheckpointError(f"{out} cannot be made: {parent} is not a writable directory")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not an empty folder")


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A folder to fill that becomes `out` when the block ends, or is deleted when it raises.

    Raises:
        CheckpointError: As `require_free` does.
    """
    out = Path(out).absolute()
    require_free(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        # Replaces an empty folder, and nothing else.
        os.rename(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _by_step(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=_step, reverse=True)


def _write(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
