"""The weight files of a model folder, looked at without reading the weights.

Every fault is a RunError that names the file: what a loader says of it hours later, in another
process, does not.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cohort.cluster.errors import RunError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
BIN = "pytorch_model*.bin"
# How safetensors calls the numbers of weights that can be trained.
TRAINABLE = {"F64", "F32", "F16", "BF16"}
PACKED = {"U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "I32", "U32"}


@dataclass(frozen=True)
class WeightFiles:
    """files: all of them. size: in bytes. sizes: how many numbers each tensor has by its name;
    empty for files of torch, which are not looked into."""

    files: tuple[Path, ...]
    size: int
    sizes: Mapping[str, int]

    @property
    def stored(self) -> int:
        return sum(self.sizes.values())

    def describe(self) -> str:
        kind = "safetensors" if self.sizes else "torch"
        return f"weights: {len(self.files)} {kind} file(s), {self.size / 2**20:,.0f} MiB"


def weight_files(folder: Path) -> WeightFiles:
    """The weights of a model folder. Raises RunError unless they are there, whole and plain."""
    index = folder / INDEX
    if index.is_file():
        named = _index(index)
        files = tuple(folder / name for name in sorted(set(named.values())))
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise RunError(f"model.path={folder}: {', '.join(missing)} missing ({INDEX} names it)")
    else:
        named, files = {}, tuple(file for file in [folder / SINGLE] if file.is_file())
    if not files:
        return _torch_files(folder)
    sizes: dict[str, int] = {}
    for file in files:
        found = dict(_tensors(file))
        for name in (name for name, where in named.items() if where == file.name):
            if name not in found:
                raise RunError(f"model.path: {file} lacks {name}, which {INDEX} says it holds")
        sizes |= found
    return WeightFiles(files, sum(file.stat().st_size for file in files), sizes)


def compare_with_model(folder: Path, weights: WeightFiles, shapes: Mapping[str, int]) -> None:
    """Raise RunError when the files cannot be of the model that config.json describes.

    shapes: how many numbers each of its parameters has; tied ones once.
    """
    if not weights.sizes:
        return
    for name, count in shapes.items():
        # Loaders know older names; the same name must be the same thing.
        if weights.sizes.get(name, count) != count:
            raise RunError(
                f"model.path={folder}: {name} has {weights.sizes[name]:,} numbers in its file, and "
                f"{count:,} by config.json: they do not belong together"
            )
    parameters = sum(shapes.values())
    # Tied matrices are often stored twice, and never count twice.
    if weights.stored < parameters:
        raise RunError(
            f"model.path={folder}: the files hold {weights.stored:,} numbers, config.json "
            f"describes {parameters:,}"
        )


def _index(file: Path) -> dict[str, str]:
    """Tensor name -> file name. Raises RunError."""
    named = read_object(file).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise RunError(f"model.path: {file} has no weight_map")
    return {str(name): str(where) for name, where in named.items()}


def _tensors(file: Path) -> Iterator[tuple[str, int]]:
    """Name and number of numbers of every tensor, from the header. Raises RunError."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                part = tensors.get_slice(name)
                kind = part.get_dtype()
                if kind in PACKED and name.endswith(("weight", "weight_packed", "qweight")):
                    raise RunError(
                        f"model.path: {name} in {file} is quantized ({kind}): train from the "
                        "model's unquantized weights"
                    )
                yield name, math.prod(part.get_shape())
    except SafetensorError as error:
        # Cut short, or a pointer of Git LFS in its place.
        raise RunError(f"model.path: {file} is not a whole safetensors file: {error}") from error
    except OSError as error:
        raise RunError(f"model.path: {file} cannot be read: {error}") from error


def _torch_files(folder: Path) -> WeightFiles:
    """pytorch_model*.bin, for folders without safetensors. Raises RunError."""
    files = tuple(sorted(folder.glob(BIN)))
    if not files:
        raise RunError(f"model.path={folder}: there is no {SINGLE}{_instead(folder)}")
    for file in files:
        try:
            with file.open("rb") as opened:
                start = opened.read(2)
        except OSError as error:
            raise RunError(f"model.path: {file} cannot be read: {error}") from error
        # Files of torch before 1.6 are pickles, which say nothing of their length.
        if not zipfile.is_zipfile(file) and not start.startswith(b"\x80"):
            raise RunError(
                f"model.path: {file} is not a whole file of torch: it was cut short, or is a "
                "pointer of Git LFS"
            )
    return WeightFiles(files, sum(file.stat().st_size for file in files), {})


def _instead(folder: Path) -> str:
    """What else the folder holds, and what to do with it."""
    if gguf := sorted(file.name for file in folder.glob("*.gguf")):
        return (
            f", only {gguf[0]}, whose weights are quantized or packed: train from the model's "
            "unquantized folder, or convert it with transformers "
            "(AutoModelForCausalLM.from_pretrained(..., gguf_file=...).save_pretrained)"
        )
    if (folder / "adapter_config.json").is_file():
        return adapter(folder)
    others = sorted(
        file.name
        for pattern in ("*.safetensors", "*.pth", "*.pt", "*.h5", "*.msgpack", "*.ckpt")
        for file in folder.glob(pattern)
    )
    return f", only {', '.join(others[:3])}" if others else ""


def adapter(folder: Path) -> str:
    """Why a folder with an adapter alone is no model, and what to do; after a comma."""
    base = read_object(folder / "adapter_config.json").get("base_model_name_or_path")
    return (
        f", only an adapter (adapter_config.json) for {base or 'another model'}: merge it into that"
        " model (peft: merge_and_unload) and save the whole"
    )


def read_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file of a model folder. Raises RunError that names the file."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"model.path: {file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"model.path: {file} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise RunError(f"model.path: {file} must hold an object, not {type(found).__name__}")
    return found
