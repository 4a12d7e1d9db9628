"""The published file: plain safetensors, all names, nothing half-written."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load_file

from cohort.actors.weight_file import TensorSpec, decode_header, encode_header, tensors_in
from cohort.learner.weights import WeightFiles, check_names, gather_named_weights, weight_specs
from tests.learner.helpers import tiny_model


@pytest.mark.parametrize("kind", ["llama-tied", "qwen2-untied", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_file_is_the_model(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(kind).to(dtype)
    check_names(model)
    specs = weight_specs(model, zero_stage=0)
    files = WeightFiles(tmp_path)
    path = files.path(3)
    fingerprint, nbytes = files.publish(3, [], specs, gather_named_weights(model, 0))
    found = load_file(path)
    # A tied output layer is not sent twice.
    tied = model.config.tie_word_embeddings
    assert set(model.state_dict()) - set(found) == ({"lm_head.weight"} if tied else set())
    for name, tensor in found.items():
        assert torch.equal(tensor, model.state_dict()[name])
    data = path.read_bytes()
    assert [spec for spec, _ in decode_header(data)] == specs
    for name, tensor in tensors_in(bytearray(data)):
        assert torch.equal(tensor, found[name])
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
        WeightFiles(tmp_path).publish(1, [], specs, tensors)
    assert list(tmp_path.iterdir()) == []


def test_odd_shapes(tmp_path: Path) -> None:
    tensors = {
        "scalar": torch.tensor(1.5),
        "empty": torch.zeros(0, 3),
        "one": torch.ones(1, dtype=torch.bfloat16),
        "transposed": torch.arange(6.0).view(2, 3).t(),
    }
    specs = [TensorSpec(n, tuple(t.shape), t.dtype) for n, t in tensors.items()]
    files = WeightFiles(tmp_path)
    files.publish(1, [], specs, tensors.items())
    found = load_file(files.path(1))
    mapped = dict(tensors_in(bytearray(files.path(1).read_bytes())))
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)
        assert torch.equal(mapped[name], tensor)


def test_memory_of_versions_without_readers_is_used_again(tmp_path: Path) -> None:
    files = WeightFiles(tmp_path)
    spec = [TensorSpec("a", (4,), torch.float32)]

    def publish(version: int, keep: list[int], value: float) -> None:
        digest, size = files.publish(version, keep, spec, [("a", torch.full((4,), value))])
        assert torch.equal(load_file(files.path(version))["a"], torch.full((4,), value))
        data = files.path(version).read_bytes()
        assert (digest, size) == (xxhash.xxh3_128(data).hexdigest(), len(data))

    publish(0, [], 0.0)
    publish(1, [0], 1.0)
    assert torch.equal(load_file(files.path(0))["a"], torch.zeros(4))
    pages = files.path(0).stat().st_ino
    publish(2, [1], 2.0)
    assert files.path(2).stat().st_ino == pages
    assert sorted(p.name for p in tmp_path.iterdir()) == ["v1.safetensors", "v2.safetensors"]
    assert torch.equal(load_file(files.path(1))["a"], torch.ones(4))
    # A step that was left out: the same version once more, the one before still readable.
    publish(2, [2], 2.0)
    publish(3, [2], 3.0)
    assert torch.equal(load_file(files.path(2))["a"], torch.full((4,), 2.0))
    # Files of another size are not used again.
    longer = [TensorSpec("a", (4000,), torch.float32)]
    files.publish(4, [3], longer, [("a", torch.ones(4000))])
    assert torch.equal(load_file(files.path(4))["a"], torch.ones(4000))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["v3.safetensors", "v4.safetensors"]


@pytest.mark.parametrize("damage", ["empty", "no header", "cut", "short"])
def test_what_is_no_weight_file_is_refused(damage: str) -> None:
    header, _, size = encode_header([TensorSpec("a", (4,), torch.float32)])
    data = {
        "empty": b"",
        "no header": b"x" * 40,
        "cut": header[:-30],
        "short": header + b"0" * (size - len(header) - 1),
    }[damage]
    with pytest.raises(ValueError):
        decode_header(data)


def test_files_are_made_anew_in_a_folder_of_ones_own(tmp_path: Path) -> None:
    spec, tensors = [TensorSpec("a", (4,), torch.float32)], [("a", torch.ones(4))]
    files = WeightFiles(tmp_path / "made")
    files.publish(1, [], spec, tensors)
    assert files.folder.stat().st_mode & 0o777 == 0o700
    assert files.path(1).stat().st_mode & 0o777 == 0o600

    victim = tmp_path / "victim"
    victim.write_text("precious")
    planted = tmp_path / "planted"
    planted.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(FileExistsError):
        WeightFiles(planted).publish(1, [], spec, tensors)
    assert not list((tmp_path / "elsewhere").iterdir())
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    with pytest.raises(FileExistsError):
        WeightFiles(shared).publish(1, [], spec, tensors)
    # A link under the name of the file that is about to be written.
    (files.folder / f".v2.{os.getpid()}.tmp").symlink_to(victim)
    with pytest.raises(FileExistsError):
        files.publish(2, [1], spec, tensors)
    assert victim.read_text() == "precious"


def test_a_rank_that_comes_after_goes_on_where_the_one_before_was(tmp_path: Path) -> None:
    spec = [TensorSpec("a", (4,), torch.float32)]

    def publish(files: WeightFiles, version: int, keep: list[int]) -> None:
        files.publish(version, keep, spec, [("a", torch.full((4,), float(version)))])

    before = WeightFiles(tmp_path)
    publish(before, 1, [])
    publish(before, 2, [1])
    (tmp_path / ".v3.77.tmp").write_bytes(b"half")
    after = WeightFiles(tmp_path)
    # Engines may be reading 2; 1 has no readers any more.
    publish(after, 3, [2])
    assert {path.name for path in tmp_path.iterdir()} == {"v2.safetensors", "v3.safetensors"}
    # What it publishes a second time is there once.
    publish(WeightFiles(tmp_path), 3, [2])
    assert {path.name for path in tmp_path.iterdir()} == {"v2.safetensors", "v3.safetensors"}
    for version in (2, 3):
        found = load_file(tmp_path / f"v{version}.safetensors")["a"]
        assert found.equal(torch.full((4,), float(version)))


def test_versions_that_went_with_their_owner_are_not_missed(tmp_path: Path) -> None:
    folder = tmp_path / "shm"
    files = WeightFiles(folder)
    spec = [TensorSpec("a", (4,), torch.float32)]
    for version in (1, 2):
        files.publish(version, [1], spec, [("a", torch.ones(4))])
    shutil.rmtree(folder)
    files.publish(3, [2], spec, [("a", torch.zeros(4))])
    assert [path.name for path in folder.iterdir()] == ["v3.safetensors"]
