"""The fingerprint of a run, which its checkpoints hold: config, rows, model and reward code.

Covered are every config key; of a dataset all rows in their order, of other tasks their sizes and
rows spread over both splits; of a model folder the small files whole, and of weight files the size,
both ends and blocks spread over them; of a user's own tasks, environments and reward functions the
file that the config names, not what it imports.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NotRequired, TypedDict

from pydantic import JsonValue

from cohort.cluster.config import Config, expand
from cohort.rewards.environments.loading import BUILT_IN as ENVIRONMENTS
from cohort.rewards.specs import RewardSpec
from cohort.rewards.tasks import BUILT_IN, Fingerprinted, Row, Task

VERSION = 1
# Rows of each split that stand for all of a task that does not name its rows itself.
SAMPLED_ROWS = 64
# A file of at most so many bytes is read whole; of a larger one both ends and blocks between them.
WHOLE_BYTES = 32 << 20
BLOCKS, BLOCK_BYTES = 64, 64 << 10
# The files of a model folder that decide weights, tokens and text.
MODEL_FILES = (
    "*.json",
    "*.safetensors",
    "pytorch_model*.bin",
    "*.model",
    "*.jinja",
    "tokenizer.model*",
    "*.tiktoken",
    "vocab.*",
    "merges.txt",
    "chat_templates/*",
    "additional_chat_templates/*",
)
# Stands for the files of a hub id, which are fetched one by one while a run starts.
COMMIT = "commit"
# Section -> key -> value.
ConfigTree = dict[str, dict[str, JsonValue]]


class Fingerprint(TypedDict):
    """What a resumed run must have in common with the one that was saved, as JSON.

    Attributes:
        version: Of this layout.
        config: Every key.
        rows: Name of a part of the data -> its size and digest.
        model: File of the model folder -> its size and digest; of a hub id, `commit` -> that of
            its repository. Empty where it is not known.
        code: `rewards.functions: PATH`, `task.name: PATH` or `task.environment: PATH` -> digest of
            its file.
        init_from: As `model`, of the folder whose weights the run started from, where that was
            another. It is recorded, not compared: a resumed run has the checkpoint's weights.
    """

    version: int
    config: ConfigTree
    rows: dict[str, str]
    model: dict[str, str]
    code: dict[str, str]
    init_from: NotRequired[dict[str, str]]


def fingerprint(
    config: Config,
    model_path: str,
    task: Task,
    specs: Sequence[RewardSpec],
    init_from: Path | None = None,
) -> Fingerprint:
    """Fingerprint a run that is about to start.

    Args:
        config: The run's config.
        model_path: The folder or hub id that `inspect_model` found.
        task: The loaded task; a sample of its rows is read.
        specs: The reward functions in use.
        init_from: The folder whose weights it starts from; None: those of the model.
    """
    found: Fingerprint = {
        "version": VERSION,
        "config": config.model_dump(mode="json"),
        "rows": row_digests(task),
        "model": model_digests(model_path),
        "code": code_digests(config, specs),
    }
    if init_from is not None:
        found["init_from"] = {"folder": str(init_from), **model_digests(str(init_from))}
    return found


def row_digests(task: Task) -> dict[str, str]:
    """Sizes and digests of both splits, and those that the task itself gives."""
    found = {
        "training": f"{task.train_size():,} rows, {_sampled(task.train_size(), task.train_row)}",
        "held-out": f"{task.eval_size():,} rows, {_sampled(task.eval_size(), task.eval_row)}",
    }
    return found | (task.fingerprint() if isinstance(task, Fingerprinted) else {})


def _sampled(size: int, row: Callable[[int], Row]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    last = max(1, min(SAMPLED_ROWS, size) - 1)
    for index in sorted({place * (size - 1) // last for place in range(last + 1)}):
        found = row(index)
        # Values of other types count by their type alone: their text may hold an address.
        text = json.dumps(
            [index, found.id, found.content, found.columns, found.source],
            default=lambda value: type(value).__name__,
            skipkeys=True,
        )
        digest.update(text.encode())
    return digest.hexdigest()


def model_digests(path: str) -> dict[str, str]:
    """Size and digest of each file of a model folder; the commit of a hub id in the cache."""
    folder = Path(path)
    if not folder.is_dir():
        cached = _cached(path)
        return {} if cached is None else {COMMIT: cached.name}
    files = {file for pattern in MODEL_FILES for file in folder.glob(pattern) if file.is_file()}
    return {
        file.relative_to(folder).as_posix(): f"{file.stat().st_size:,} bytes, {file_digest(file)}"
        for file in sorted(files)
    }


def _cached(hub_id: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(hub_id, "config.json")
    return Path(found).parent if isinstance(found, str) else None


def file_digest(file: Path) -> str:
    """Digest of a file; of a large one, of its size, its ends and blocks between them."""
    digest = hashlib.blake2b(digest_size=8)
    size = file.stat().st_size
    digest.update(str(size).encode())
    with file.open("rb") as opened:
        if size <= WHOLE_BYTES:
            digest.update(opened.read())
        else:
            # The first block holds all or most of a safetensors header.
            for place in range(BLOCKS):
                opened.seek(place * (size - BLOCK_BYTES) // (BLOCKS - 1))
                digest.update(opened.read(BLOCK_BYTES))
    return digest.hexdigest()


def code_digests(config: Config, specs: Sequence[RewardSpec]) -> dict[str, str]:
    """Digests of the files that hold the user's own task, environment and reward functions."""
    paths = {f"rewards.functions: {spec.path}": spec.path for spec in specs}
    if config.task.name not in BUILT_IN:
        paths[f"task.name: {config.task.name}"] = config.task.name
    path = config.task.environment
    if path is not None and path not in ENVIRONMENTS:
        paths[f"task.environment: {path}"] = path
    files = {name: _source(path) for name, path in paths.items()}
    return {name: file_digest(file) for name, file in files.items() if file is not None}


def _source(path: str) -> Path | None:
    """The file of `path.py:name` or `module:name`, found without importing it.

    None for Cohort's own functions, which change with its version, and where there is no file.
    """
    location = path.rpartition(":")[0]
    if location.endswith(".py") or os.sep in location:
        file = expand(location)
        return file if file.is_file() else None
    parts = location.split(".")
    if parts[0] == "cohort":
        return None
    for folder in sys.path:
        base = Path(folder or os.curdir).joinpath(*parts)
        for file in (base / "__init__.py", base.with_name(f"{base.name}.py")):
            if file.is_file():
                return file
    return None
