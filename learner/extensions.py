"""DeepSpeed's compiled part, built or loaded by one process of a machine at a time."""

from __future__ import annotations

import fcntl
import hashlib
import os
import sys
from pathlib import Path


def use_folder(device: str) -> Path:
    """Set, for this process, where compiled parts are kept: one folder per installation of torch.

    A build names the paths of torch's headers: two installations of the same versions that shared a
    folder would build again for each other, half a minute at every start.

    Below $TORCH_EXTENSIONS_DIR when that is set, else below ~/.cache/cohort/extensions.
    """
    import deepspeed
    import torch

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR", "~/.cache/cohort/extensions")).expanduser()
    python = f"py{sys.version_info.major}.{sys.version_info.minor}"
    place = hashlib.sha256(torch.__file__.encode()).hexdigest()[:8]
    versions = f"torch{torch.__version__}-deepspeed{deepspeed.__version__}"
    name = f"{python}-{versions}-{device}-{place}"
    folder = root if root.name == name else root / name  # already set, here or in a parent
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TORCH_EXTENSIONS_DIR"] = str(folder)
    return folder


def load(device: str) -> None:
    """Load what DeepSpeed's communication needs, compiling it the first time.

    Every load asks ninja whether the build is up to date. A ninja of another version, found first
    on another PATH, takes it for outdated and builds again, a minute or two each time: the one of
    this Python installation is found first from here on.

    torch marks a build by a lock file, which stays behind when its process is killed; every later
    build would hang on it. Here the kernel holds the lock and drops it with the process: whoever
    holds it knows that torch's lock file is left over, and deletes it.
    """
    from deepspeed.comm.torch import build_shm_op

    use_own_programs()
    folder = use_folder(device)
    with (folder / "cohort.lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in folder.glob("*/lock"):
            left.unlink(missing_ok=True)
        build_shm_op()


def use_own_programs() -> None:
    """Have this process find the programs of its Python installation first."""
    own = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", os.defpath).split(os.pathsep)
    os.environ["PATH"] = os.pathsep.join([own, *(place for place in path if place != own)])
