"""Digests of weights, and what is concluded from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cohort.actors.proof import Feed, Proof, digest, file_digests

BF16 = torch.bfloat16


def matrix(rows: int, columns: int, seed: int = 0, dtype: torch.dtype = BF16) -> torch.Tensor:
    torch.manual_seed(seed)
    return torch.randn(rows, columns).to(dtype)


def nudged(tensor: torch.Tensor, at: int, by: int = 1) -> torch.Tensor:
    """One number moved by this many of its smallest steps."""
    moved = tensor.clone()
    moved.view(-1).view(torch.int16 if tensor.dtype == BF16 else torch.int32)[at] += by
    return moved


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(8, 64), (5, 7), (64,), (3, 4, 8), (6, 1, 4), (1, 1)])
def test_a_digest_is_of_every_number(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    for tensor in (torch.randn(shape).to(dtype), torch.zeros(shape, dtype=dtype)):
        assert digest(tensor) == digest(tensor.clone())
        bits = torch.int16 if dtype.itemsize == 2 else torch.int32
        for at in range(tensor.numel()):
            moved = tensor.clone()
            moved.view(-1).view(bits)[at] += 1
            assert digest(moved) != digest(tensor)


def test_no_two_small_changes_of_a_matrix_cancel() -> None:
    """What a step at a small learning rate leaves of a mixture: few numbers, one bit each."""
    torch.manual_seed(3)
    tensor = matrix(32, 64)
    for _ in range(2000):
        a, b = torch.randint(tensor.numel(), (2,)).tolist()
        moved = nudged(nudged(tensor, a, 1), b, -1)
        assert (digest(moved) == digest(tensor)) == torch.equal(moved, tensor)


def test_fused_matrices_have_the_sum_of_their_digests() -> None:
    q, k, v = matrix(64, 48, 1), matrix(16, 48, 2), matrix(16, 48, 3)
    fused = torch.cat([q, k, v])
    total = (digest(q) + digest(k) + digest(v)) % 2**64
    assert digest(fused) == total
    assert digest(fused[torch.randperm(96)]) == total
    assert digest(torch.cat([fused, torch.zeros(32, 48, dtype=BF16)])) == total, "padding"
    assert digest(q.t()) == digest(q.t().contiguous())
    assert digest(torch.empty(0)) == 0


def test_large_tensors_are_digested_in_parts() -> None:
    big = matrix(2000, 600, dtype=torch.float32)
    assert digest(big) == (digest(big[:700]) + digest(big[700:])) % 2**64


def test_a_files_digests_are_its_tensors(tmp_path: Path) -> None:
    tensors = {"a": matrix(4, 8), "odd": torch.ones(3, dtype=BF16), "b": matrix(8, 4, 2)}
    save_file(tensors, tmp_path / "f")
    assert file_digests(str(tmp_path / "f")) == {n: digest(t) for n, t in tensors.items()}
    turned = file_digests(str(tmp_path / "f"), ["b"])
    assert turned["b"] == digest(tensors["b"].t())
    assert turned["a"] == digest(tensors["a"])


class Model:
    """Weights as they are published, and the layers that an engine makes of them."""

    def __init__(self) -> None:
        self.tensors = {
            "embed": matrix(40, 16, 1),
            "q": matrix(16, 16, 2),
            "k": matrix(8, 16, 3),
            "conv": matrix(16, 24, 4),
            "norm": matrix(1, 16, 5)[0],
            "decay": matrix(1, 16, 6)[0],
        }

    def published(self, turned: tuple[str, ...] = ("conv",)) -> dict[str, int]:
        return {name: digest(t.t() if name in turned else t) for name, t in self.tensors.items()}

    def layers(self) -> dict[str, torch.Tensor]:
        t = self.tensors
        return {
            "embed": t["embed"],
            "qk": torch.cat([t["q"], t["k"]]),
            "conv": t["conv"].t(),
            "norm": t["norm"],
            # Computed from what was published.
            "decay": -t["decay"].float().exp(),
            "head": t["embed"],
        }

    def held(self) -> dict[str, int | None]:
        return {name: digest(tensor) for name, tensor in self.layers().items()}

    def layout(self) -> dict[str, list[Feed]]:
        def fed(*names: str) -> list[Feed]:
            turned = [name == "conv" for name in names]
            return [
                Feed(
                    name=n,
                    transposed=t,
                    digest=digest(self.tensors[n].t() if t else self.tensors[n]),
                )
                for n, t in zip(names, turned, strict=True)
            ]

        return {
            "embed": fed("embed"),
            "qk": fed("q", "k"),
            "conv": fed("conv"),
            "norm": fed("norm"),
            "decay": fed("decay"),
        }

    def step(self, *names: str) -> None:
        """One number of each (of all, if none is named) moves by its smallest step."""
        for name in names or self.tensors:
            self.tensors[name] = nudged(self.tensors[name], 3)


def proof_of(model: Model) -> Proof:
    proof = Proof([model.layout()], [model.held()], model.published(), {"head": "embed"})
    assert proof.transposed == {"conv"}
    assert proof.wrong([model.held()], model.published()) is None
    return proof


def test_every_version_that_is_loaded_is_right() -> None:
    model = Model()
    proof = proof_of(model)
    for moved in [(), (), ("q",), ("decay",), ("norm", "conv")]:
        model.step(*moved)
        assert proof.wrong([model.held()], model.published()) is None
    # Nothing moved: also right.
    assert proof.wrong([model.held()], model.published()) is None


def test_an_update_that_is_ignored_is_wrong() -> None:
    model = Model()
    proof, before = proof_of(model), model.held()
    model.step()
    wrong = proof.wrong([before], model.published())
    assert wrong is not None
    assert "5 of 6 layers" in wrong
    assert "those of the version before" in wrong


@pytest.mark.parametrize("layer", ["embed", "qk", "conv", "norm", "head"])
@pytest.mark.parametrize("moved", [(), ("embed", "q", "conv", "norm")])
def test_a_single_layer_of_the_version_before_is_wrong(layer: str, moved: tuple[str, ...]) -> None:
    model = Model()
    proof, before = proof_of(model), model.held()
    model.step(*moved)
    wrong = proof.wrong([{**model.held(), layer: before[layer]}], model.published())
    assert wrong is not None
    assert f"(those of the version before): {layer}" in wrong


@pytest.mark.parametrize("layer", ["embed", "qk", "conv", "norm", "decay", "head"])
def test_a_layer_that_was_exchanged_or_torn_is_wrong(layer: str) -> None:
    model = Model()
    proof = proof_of(model)
    model.step("q")
    for value in (None, 12345):
        wrong = proof.wrong([{**model.held(), layer: value}], model.published())
        assert wrong is not None
        assert layer in wrong
        assert proof.wrong([model.held()], model.published()) is None


def test_a_computed_layer_that_never_moves_is_wrong() -> None:
    model = Model()
    proof, before = proof_of(model), model.held()
    model.step("decay")
    wrong = proof.wrong([{**model.held(), "decay": before["decay"]}], model.published())
    assert wrong == "the update changed nothing in decay"


def test_a_layer_that_goes_missing_is_wrong() -> None:
    model = Model()
    proof = proof_of(model)
    held = model.held()
    del held["qk"]
    assert proof.wrong([held], model.published()) is not None


def test_a_version_that_was_wrong_at_first_is_not_taken_for_the_layers_nature() -> None:
    """The very first update mixes: its layers were given other tensors than are published."""
    model = Model()
    old = model.tensors["q"]
    layout = model.layout()
    model.step("q")
    held = {**model.held(), "qk": digest(torch.cat([old, model.tensors["k"]]))}
    proof = Proof([layout], [held], model.published(), {"head": "embed"})
    assert "qk" in (proof.wrong([held], model.published()) or "")


def test_several_workers_hold_shares_or_the_same() -> None:
    """Tensor parallel: rows of a matrix are dealt out, a norm is everywhere."""
    model = Model()

    def workers() -> list[dict[str, int | None]]:
        layers = model.layers()
        return [
            {
                **{n: digest(layers[n][half::2]) for n in ("embed", "qk", "conv", "head")},
                "norm": digest(layers["norm"]),
                "decay": digest(layers["decay"]),
            }
            for half in range(2)
        ]

    layouts = [model.layout()] * 2
    proof = Proof(layouts, workers(), model.published(), {"head": "embed"})
    assert proof.wrong(workers(), model.published()) is None
    model.step()
    fresh = workers()
    assert proof.wrong(fresh, model.published()) is None
    before = workers()
    model.step()
    for layer in ("embed", "qk", "conv", "norm"):
        mixed = [workers()[0], {**workers()[1], layer: before[1][layer]}]
        changed = workers()[1][layer] != before[1][layer]
        assert (proof.wrong(mixed, model.published()) is None) != changed, layer
        assert proof.wrong(workers(), model.published()) is None
