"""What `model.lora` trains, and the adapter that it starts from, checked before anything starts."""

from __future__ import annotations

import math
from pathlib import Path

from cohort.cluster.config import Config, expand
from cohort.cluster.errors import RunError
from cohort.cluster.model_folder import empty_model, starting_folder
from cohort.learner.checkpoint import ADAPTER_FOLDER, CheckpointError


def trained_parameters(config: Config, path: str) -> int | None:
    """How many numbers the adapters of `model.lora` have; None: all weights are trained.

    Args:
        config: The run's config.
        path: The model's folder or hub id.

    Raises:
        RunError: The model has no such layers.
    """
    if config.model.lora is None:
        return None
    return sum(math.prod(shape) for shape in _shapes(config, path).values())


def starting_adapter(config: Config) -> Path | None:
    """The folder with the adapter that model.init_from names; None: a new one is trained.

    Raises:
        RunError: There is none, or it does not fit model.path and model.lora.
    """
    from cohort.learner.adapter_files import check_adapter

    lora = config.model.lora
    if config.model.init_from is None or lora is None:
        return None
    key = f"model.init_from={config.model.init_from}"
    folder = starting_folder(key, expand(config.model.init_from), ADAPTER_FOLDER)
    if not (folder / "adapter_config.json").is_file():
        raise RunError(
            f"{key}: no adapter_config.json there. With model.lora, this key must name an adapter; "
            "to train a new adapter on other weights, set model.path to those weights"
        )
    try:
        check_adapter(folder, lora, _shapes(config, str(expand(config.model.path))))
    except CheckpointError as error:
        raise RunError(f"{key}: {error}") from error
    return folder.resolve()


def _shapes(config: Config, path: str) -> dict[str, tuple[int, int]]:
    from cohort.learner.logprobs import UnsupportedModel
    from cohort.learner.lora import adapter_shapes

    assert config.model.lora is not None
    try:
        return adapter_shapes(empty_model(path), config.model.lora)
    except UnsupportedModel as error:
        raise RunError(f"{error} (model.path={path})") from error
