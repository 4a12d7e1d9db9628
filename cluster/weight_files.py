"""The checks of a model folder's weight files, without reading the weights.

Every fault is a RunError that names the file, which a loader's error in another process does not.
"""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from cohort.cluster.errors import RunError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
BIN = "pytorch_model*.bin"
# safetensors' names for the types of quantized weights.
PACKED = {"U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "I32", "U32"}


@dataclass(frozen=True)
class WeightFiles:
    """The weight files of a model.

    Attributes:
        files: All of them.
        size: Their bytes together.
        sizes: Tensor name -> number of elements; empty for torch's files, which are not opened.
    """

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
    """Find the weights of a model folder.

    Raises:
        RunError: There are none, or one is missing, truncated or quantized.
    """
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
    """Compare the files with the model that config.json describes.

    Args:
        folder: The model folder, for messages.
        weights: Its weight files.
        shapes: Parameter name -> number of elements; tied parameters once.

    Raises:
        RunError: The files cannot be of this model.
    """
    if not weights.sizes:
        return
    for name, count in shapes.items():
        # Loaders also accept older names; the same name must be the same parameter.
        if weights.sizes.get(name, count) != count:
            raise RunError(
                f"model.path={folder}: {name} has {weights.sizes[name]:,} numbers in its file, and "
                f"{count:,} by config.json: they do not belong together"
            )
    parameters = sum(shapes.values())
    # Tied parameters may be stored twice; they are counted once.
    if weights.stored < parameters:
        raise RunError(
            f"model.path={folder}: the files hold {weights.stored:,} numbers, config.json "
            f"describes {parameters:,}"
        )


def _index(file: Path) -> dict[str, str]:
    """Tensor name -> file name."""
    named = read_object(file).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise RunError(f"model.path: {file} has no weight_map")
    return {str(name): str(where) for name, where in named.items()}


def _tensors(file: Path) -> Iterator[tuple[str, int]]:
    """Name and number of elements of every tensor, from the header."""
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
        # Truncated, or a pointer of Git LFS.
        raise RunError(f"model.path: {file} is not a whole safetensors file: {error}") from error
    except OSError as error:
        raise RunError(f"model.path: {file} cannot be read: {error}") from error


def _torch_files(folder: Path) -> WeightFiles:
    """pytorch_model*.bin, for folders without safetensors."""
    files = tuple(sorted(folder.glob(BIN)))
    if not files:
        raise RunError(f"model.path={folder}: there is no {SINGLE}{_instead(folder)}")
    for file in files:
        try:
            with file.open("rb") as opened:
                start = opened.read(2)
        except OSError as error:
            raise RunError(f"model.path: {file} cannot be read: {error}") from error
        # Files of torch before 1.6 are pickles, which do not hold their length.
        if not zipfile.is_zipfile(file) and not start.startswith(b"\x80"):
            raise RunError(
                f"model.path: {file} is not a whole file of torch: it is truncated, or "
                "a pointer of Git LFS"
            )
    return WeightFiles(files, sum(file.stat().st_size for file in files), {})


def _instead(folder: Path) -> str:
    """What the folder holds instead, and what to do with it; begins with a comma."""
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
    """Why a folder with only an adapter is not a model, and what to do; begins with a comma."""
    base = read_object(folder / "adapter_config.json").get("base_model_name_or_path")
    return (
        f", only an adapter (adapter_config.json) for {base or 'another model'}: merge it into that"
        " model (peft: merge_and_unload) and save the whole"
    )


def read_object(file: Path) -> dict[str, JsonValue]:
    """The object in a JSON file of a model folder.

    Raises:
        RunError: The file cannot be read or holds no JSON object; the message names it.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(f"model.path: {file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"model.path: {file} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise RunError(f"model.path: {file} must hold an object, not {type(found).__name__}")
    return found
