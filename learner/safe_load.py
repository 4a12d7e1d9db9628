"""Checkpoints are data: loading one runs no code out of it.

DeepSpeed pickles its state and asks torch to load any pickle, which may run anything. In here torch
builds tensors, plain values and the few classes that DeepSpeed's state is made of, and refuses the
rest before anything is called.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

from cohort.learner.checkpoint import CheckpointError

FORCED, FORBIDDEN = "TORCH_FORCE_WEIGHTS_ONLY_LOAD", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@contextlib.contextmanager
def only_data(folder: Path) -> Iterator[None]:
    """In this block, `torch.load` loads only data, whatever its caller asks for.

    Args:
        folder: What is loaded, for the message.

    Raises:
        CheckpointError: A file holds more than data.
    """
    import torch
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    known = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    before = {name: os.environ.pop(name, None) for name in (FORCED, FORBIDDEN)}
    os.environ[FORCED] = "1"
    try:
        with torch.serialization.safe_globals(known):
            yield
    except pickle.UnpicklingError as error:
        named = re.search(r"(?:GLOBAL|function|class) ([\w.]+)", str(error))
        what = f" ({named[1]})" if named else ""
        raise CheckpointError(
            f"{folder} holds more than tensors and plain values{what}: it is damaged, or was not "
            "written by a run of this version. Nothing in it was run; resume from another "
            f"checkpoint, or start a new run from {folder / 'hf'}"
        ) from error
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
