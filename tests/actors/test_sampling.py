"""Inverse transform sampling against the distribution it samples from."""

from __future__ import annotations

import torch

from cohort.actors.sampling import tokens_at, uniforms

ALMOST_ONE = 1 - 2**-53


def test_each_entry_owns_its_share_of_the_unit_interval() -> None:
    probabilities = torch.tensor([0.25, 0.5, 0.0, 0.25]).expand(7, -1)
    points = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 0.9999, ALMOST_ONE]).double()
    assert tokens_at(probabilities, points).tolist() == [0, 0, 1, 1, 3, 3, 3]


def test_what_cannot_happen_never_does() -> None:
    # Masked entries at both ends and between; sums that are not 1, as float32 softmaxes leave them.
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(64, 1000, generator=generator)
    probabilities[:, ::3] = 0.0
    probabilities[:, -1] = 0.0
    for point in (0.0, 0.5, ALMOST_ONE):
        chosen = tokens_at(probabilities, torch.full((64,), point, dtype=torch.float64))
        assert (probabilities.gather(1, chosen[:, None]) > 0).all()


def test_frequencies_are_the_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.04, 0.01, 0.0])
    n = 200_000
    torch.manual_seed(0)
    chosen = tokens_at(probabilities.expand(n, -1), uniforms(n, {}))
    counts = chosen.bincount(minlength=6).double()
    expected = n * probabilities.double()
    assert counts[5] == 0
    chi_square = ((counts - expected)[:5] ** 2 / expected[:5]).sum()
    assert chi_square < 18.5  # 4 degrees of freedom: p = 0.001


def test_entries_too_rare_for_float32_keep_their_share() -> None:
    # 40,000 entries of 1e-9 behind one that holds nearly everything: in float32 their cumulative
    # sums would move in steps of 6e-8, and most of them could never be chosen.
    rare = 40_000
    probabilities = torch.full((1, rare + 1), 1e-9)
    probabilities[0, 0] = 1.0
    total = float(probabilities.double().sum())
    wanted = torch.arange(1, rare + 1, 997)
    below = 1.0 + (wanted.double() - 0.5) * float(probabilities[0, 1].double())
    chosen = tokens_at(probabilities.expand(len(wanted), -1), below / total)
    assert chosen.tolist() == wanted.tolist()


def test_a_row_of_nan_ends_in_a_token_of_the_vocabulary() -> None:
    broken = torch.full((1, 5), float("nan"))
    assert 0 <= int(tokens_at(broken, torch.tensor([0.3]).double())) < 5


def test_seeded_rows_depend_on_their_seed_alone() -> None:
    def draw(size: int, row: int) -> float:
        return float(uniforms(size, {row: torch.Generator().manual_seed(7)})[row])

    assert draw(1, 0) == draw(8, 5)
    generator = torch.Generator().manual_seed(7)
    first, second = (float(uniforms(1, {0: generator})) for _ in range(2))
    assert first == draw(1, 0) != second
    torch.manual_seed(1)
    mixed = uniforms(4, {2: torch.Generator().manual_seed(7)})
    assert len(mixed.unique()) == 4 and mixed.dtype == torch.float64
