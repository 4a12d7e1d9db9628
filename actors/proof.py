"""The proof that an engine serves the weights that were published, number for number.

A step at a learning rate of 1e-6 moves log-probs by far less than engine and learner differ anyway,
so scoring a probe cannot tell one version from the next. Digests can: the engine's side takes them
of the tensors that its layers compute with (`cohort.actors.served`), the actor takes them of the
published file, and the two have to agree, layer by layer.

The digest does not depend on the order of a tensor's rows, and that of two tensors is the sum of
theirs. So it is the same whether three matrices lie one by one in a file or fused in a layer.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import torch

from cohort.actors.weight_file import tensors_in

MODULUS = 1 << 64
# Odd, so that no change of a single word can vanish in the sum.
FACTOR = 0x5851F42D4C957F2D
CHUNK_WORDS = 1 << 17
WORD_BYTES = 8
WORDS: dict[int, type[np.signedinteger]] = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
SHOWN = 4


def digest(tensor: torch.Tensor) -> int:
    """Sum over a tensor's 8-byte words x of x² + FACTOR·x, modulo 2**64.

    Words do not cross rows (the last dimension), whose order is of no matter. Vectors, and rows
    whose bytes no word divides, count by element. Zeros add nothing: padding does not show.
    """
    if tensor.numel() == 0:
        return 0
    row = tensor.shape[-1] * tensor.dtype.itemsize if tensor.dim() > 1 else 0
    size = WORD_BYTES if row and row % WORD_BYTES == 0 else tensor.dtype.itemsize
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if data.device.type != "cpu":
        integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
        whole = data.view(integers).to(torch.int64)
        return (int((whole * whole).sum()) + FACTOR * int(whole.sum())) % MODULUS
    words = data.numpy().view(WORDS[size])
    total = 0
    for start in range(0, len(words), CHUNK_WORDS):
        chunk = words[start : start + CHUNK_WORDS].astype(np.int64, copy=False)
        total += int(np.dot(chunk, chunk)) + FACTOR * int(chunk.sum())
    return total % MODULUS


def file_digests(path: str, transposed: Iterable[str] = ()) -> dict[str, int]:
    """The digest of every tensor of a published file; of these, as if they were transposed."""
    turned = set(transposed)
    with open(path, "rb") as file:
        view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    return {
        name: digest(tensor.transpose(-1, -2) if name in turned else tensor)
        for name, tensor in tensors_in(view)
    }


class Feed(TypedDict):
    """A tensor that a layer was loaded from: its name in the file ("" when its bytes do not lie
    there), whether it was turned, and its digest as the layer was given it. It travels from an
    engine's worker as it is."""

    name: str
    transposed: bool
    digest: int


class ServedLayout(TypedDict):
    """What a worker answers about its layers: see `Served.layout` and `Proof`."""

    layers: dict[str, list[Feed]]
    tied: dict[str, str]


@dataclass(frozen=True)
class _Group:
    """Layers and published tensors that hold the same numbers. exact: their digests are equal;
    otherwise the layers hold something that was computed from the tensors."""

    layers: tuple[str, ...]
    names: tuple[str, ...]
    exact: bool


Layout = Mapping[str, Sequence[Feed]]
# Of one worker: layer -> the digest of what it computes with; None when that was exchanged since.
Held = Mapping[str, int | None]


class Proof:
    """What an engine has to hold, compared with what it holds, for one update after the other.

    layouts: of every worker of the engine, from its first update. held: what they held after it.
    published: the file's digests. tied: layers that compute with another one's tensor -> that one.
    """

    def __init__(
        self,
        layouts: Sequence[Layout],
        held: Sequence[Held],
        published: Mapping[str, int],
        tied: Mapping[str, str],
    ) -> None:
        self._tied = dict(tied)
        feeds = {
            layer: [_resolved(feed, published) for feed in given]
            for layer, given in layouts[0].items()
        }
        self.transposed = frozenset(
            feed["name"] for fed in feeds.values() for feed in fed if feed["transposed"]
        )
        # How a layer's numbers lie in several workers: each has all of them, or a share.
        self._shared = {layer for layer in feeds if len({one.get(layer) for one in held}) == 1}
        values = self._values(held)
        plain = {
            layer: values[layer] == sum(feed["digest"] for feed in fed) % MODULUS
            and all(feed["name"] for feed in fed)
            for layer, fed in feeds.items()
        }
        self._groups = [
            _Group(layers, names, all(plain[layer] for layer in layers))
            for layers, names in _components(feeds)
        ]
        self._before: tuple[dict[str, int | None], dict[str, int]] | None = None

    def _values(self, held: Sequence[Held]) -> dict[str, int | None]:
        """Each layer's digest over all workers."""
        found: dict[str, int | None] = {}
        for layer in held[0]:
            parts = [one.get(layer) for one in held]
            if any(part is None for part in parts):
                found[layer] = None
            elif layer in self._shared:
                found[layer] = parts[0] if len(set(parts)) == 1 else None
            else:
                found[layer] = sum(part for part in parts if part is not None) % MODULUS
        return found

    def wrong(self, held: Sequence[Held], published: Mapping[str, int]) -> str | None:
        """What the engine holds otherwise than published, in words; None when all is right.

        Args:
            held: Of each worker, the digests of what its layers compute with.
            published: The digests of the file, with the tensors of `transposed` turned.
        """
        values = self._values(held)
        bad: list[str] = []
        old = True
        for group in self._groups:
            if not self._right(group, values, published):
                bad += group.layers
                old = old and self._stayed(group.layers, values)
        for layer, other in self._tied.items():
            if values.get(layer) is None or values[layer] != self._tensor(other, values, published):
                bad.append(layer)
                old = old and self._stayed((layer,), values)
        stuck = self._stuck(values, published)
        if bad:
            shown = ", ".join(bad[:SHOWN]) + (", ..." if len(bad) > SHOWN else "")
            which = "those of the version before" if old else "others"
            return (
                f"{len(bad)} of {len(values)} layers hold other numbers than were published "
                f"({which}): {shown}"
            )
        if stuck:
            return f"the update changed nothing in {', '.join(stuck[:SHOWN])}"
        self._before = (values, dict(published))
        return None

    def _tensor(
        self, layer: str, values: Mapping[str, int | None], published: Mapping[str, int]
    ) -> int | None:
        """What a layer's tensor should be: as published, where that can be told."""
        for group in self._groups:
            if group.layers == (layer,) and group.exact:
                return sum(published[name] for name in group.names) % MODULUS
        return values.get(layer)

    def _right(
        self, group: _Group, values: Mapping[str, int | None], published: Mapping[str, int]
    ) -> bool:
        mine = [values.get(layer) for layer in group.layers]
        held = [value for value in mine if value is not None]
        if len(held) < len(mine):
            return False
        if group.exact:
            return sum(held) % MODULUS == sum(published[name] for name in group.names) % MODULUS
        # What was computed from the same numbers is the same.
        unchanged = (
            self._before is not None
            and bool(group.names)
            and all(self._before[1].get(name) == published[name] for name in group.names)
        )
        return not unchanged or self._stayed(group.layers, values)

    def _stayed(self, layers: Sequence[str], values: Mapping[str, int | None]) -> bool:
        return self._before is not None and all(
            values.get(layer) == self._before[0].get(layer) for layer in layers
        )

    def _stuck(self, values: Mapping[str, int | None], published: Mapping[str, int]) -> list[str]:
        """Layers that hold something computed, when none of them moved although all should."""
        if self._before is None:
            return []
        before = self._before[1]
        moved = [
            group
            for group in self._groups
            if not group.exact and any(before.get(n) != published[n] for n in group.names)
        ]
        if not moved or not all(self._stayed(group.layers, values) for group in moved):
            return []
        return [layer for group in moved for layer in group.layers]


def _resolved(feed: Feed, published: Mapping[str, int]) -> Feed:
    """A feed whose bytes are not the file's, but equal those of one of its tensors."""
    if feed["name"]:
        return feed
    same = [name for name, value in published.items() if value == feed["digest"]]
    return {**feed, "name": same[0], "transposed": False} if len(same) == 1 else feed


def _components(
    feeds: Mapping[str, Sequence[Feed]],
) -> list[tuple[tuple[str, ...], tuple[str, ...]]]:
    """Layers that share tensors, and these tensors. Most are a layer of its own."""
    found: list[tuple[list[str], list[str]]] = []
    for layer, fed in feeds.items():
        names = [feed["name"] for feed in fed if feed["name"]]
        joined = [group for group in found if set(group[1]) & set(names)]
        layers = [one for group in joined for one in group[0]]
        known = [one for group in joined for one in group[1]]
        found = [group for group in found if group not in joined]
        found.append(([*layers, layer], list(dict.fromkeys([*known, *names]))))
    return [(tuple(layers), tuple(names)) for layers, names in found]
