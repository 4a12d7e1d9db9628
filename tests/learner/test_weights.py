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
    delete_old_versions,
    gather_named_weights,
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
    # Tied or not, the output layer comes under its own name too.
    assert set(found) == set(model.state_dict())
    assert "lm_head.weight" in found
    for name, tensor in model.state_dict().items():
        assert torch.equal(found[name], tensor)
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


def test_old_versions_go_but_readers_keep_theirs(tmp_path: Path) -> None:
    spec = [TensorSpec("a", (4,), torch.float32)]
    for version in range(4):
        tensor = torch.full((4,), float(version))
        write_weights(spec, [("a", tensor)], version_path(tmp_path, version))
    with open(version_path(tmp_path, 0), "rb") as reader:
        delete_old_versions(tmp_path, [3, 2])
        assert sorted(p.name for p in tmp_path.iterdir()) == ["v2.safetensors", "v3.safetensors"]
        assert reader.read()[-16:] == bytes(16)
