"""The published file: plain safetensors, all names, nothing half-written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load_file

from learner.weights import (
    TensorSpec,
    check_names,
    gather_named_weights,
    old_versions,
    read_header,
    version_path,
    weight_specs,
    write_weights,
)
from tests.learner.helpers import tiny_model


@pytest.mark.parametrize("kind", ["llama-tied", "qwen2-untied", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_file_is_the_model(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(kind).to(dtype)
    check_names(model)
    specs = weight_specs(model, zero_stage=0)
    path = version_path(tmp_path, 3)
    fingerprint, nbytes = write_weights(specs, gather_named_weights(model, 0), path)
    found = load_file(path)
    # A tied output layer is not sent twice.
    tied = model.config.tie_word_embeddings
    assert set(model.state_dict()) - set(found) == ({"lm_head.weight"} if tied else set())
    for name, tensor in found.items():
        assert torch.equal(tensor, model.state_dict()[name])
    assert list(read_header(path).values()) == specs
    data = path.read_bytes()
    assert nbytes == len(data)
    assert fingerprint == xxhash.xxh3_128(data).hexdigest()
    assert [p.name for p in tmp_path.iterdir()] == ["v3.safetensors"]


@pytest.mark.parametrize(
    "tensors",
    [
        [("a", torch.zeros(2))],
        [("a", torch.zeros(2)), ("c", torch.zeros(3))],
        [("a", torch.zeros(2)), ("b", torch.zeros(4))],
        [("a", torch.zeros(2)), ("b", torch.zeros(3).half())],
        [("a", torch.zeros(2)), ("b", torch.zeros(3)), ("c", torch.zeros(1))],
    ],
)
def test_wrong_tensors_leave_no_file(
    tensors: list[tuple[str, torch.Tensor]], tmp_path: Path
) -> None:
    specs = [TensorSpec("a", (2,), torch.float32), TensorSpec("b", (3,), torch.float32)]
    with pytest.raises(ValueError):
        write_weights(specs, tensors, tmp_path / "v1.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_odd_shapes(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        "one": torch.ones(1, dtype=torch.bfloat16),
        "transposed": torch.arange(6.0).view(2, 3).t(),
    }
    specs = [TensorSpec(n, tuple(t.shape), t.dtype) for n, t in tensors.items()]
    write_weights(specs, tensors.items(), tmp_path / "v1.safetensors")
    found = load_file(tmp_path / "v1.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_old_versions_are_found_and_their_memory_is_used_again(tmp_path: Path) -> None:
    spec = [TensorSpec("a", (4,), torch.float32)]
    for version in range(3):
        tensor = torch.full((4,), float(version))
        write_weights(spec, [("a", tensor)], version_path(tmp_path, version))
    assert old_versions(tmp_path, [2, 1]) == [version_path(tmp_path, 0)]
    pages = version_path(tmp_path, 0).stat().st_ino
    path = version_path(tmp_path, 3)
    fresh = [("a", torch.full((4,), 3.0))]
    digest, size = write_weights(spec, fresh, path, recycle=version_path(tmp_path, 0))
    assert path.stat().st_ino == pages
    assert torch.equal(load_file(path)["a"], torch.full((4,), 3.0))
    assert (digest, size) == (xxhash.xxh3_128(path.read_bytes()).hexdigest(), path.stat().st_size)
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["v1.safetensors", "v2.safetensors", "v3.safetensors"]
    # A file of another size is cut or extended.
    longer = [TensorSpec("a", (4000,), torch.float32)]
    write_weights(longer, [("a", torch.ones(4000))], version_path(tmp_path, 4), recycle=path)
    write_weights(spec, fresh, path, recycle=version_path(tmp_path, 4))
    assert torch.equal(load_file(path)["a"], torch.full((4,), 3.0))
