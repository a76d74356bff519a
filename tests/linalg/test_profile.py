"""Where a change lies against a curvature, against slow sums over dense matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from keeptune.core.low_rank import LowRank
from keeptune.linalg.curvature_profile import directions, energies, profile

N = 12


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


CHANGE = LowRank(drawn(2, 7, 2), drawn(3, 2, N))
F = drawn(0, N, N) @ drawn(0, N, N).T


def test_directions_are_eigenvectors_from_the_stiffest_on() -> None:
    found = directions(F)
    assert float(found.values.sum()) == pytest.approx(float(F.trace()))
    assert (found.values.diff() <= 0).all()
    torch.testing.assert_close(F @ found.U, found.U * found.values)


@pytest.mark.parametrize("form", ["factors", "matrix"])
def test_energies_are_those_of_the_dense_change(form: str) -> None:
    E, along = CHANGE.dense(), directions(F)
    found = energies(CHANGE if form == "factors" else E, along)
    assert found.tolist() == pytest.approx([float((E @ u).square().sum()) for u in along.U.T], abs=1e-9)
    assert float(found.sum()) == pytest.approx(float(E.square().sum()))
    felt = float((found * along.values).sum())
    assert felt == pytest.approx(float((E @ F @ E.T).trace()), rel=1e-9), "tr(E F Eᵀ)"


def slow(widths: list[float], energy: list[float], bins: int) -> list[float]:
    """Cut every direction into many slivers and drop each where its middle lies."""
    slivers, total, place = 20_000, sum(widths), 0.0
    shares = [0.0] * bins
    for width, own in zip(widths, energy, strict=True):
        for n in range(slivers):
            middle = (place + width * (n + 0.5) / slivers) / total
            shares[min(int(middle * bins), bins - 1)] += own / slivers
        place += width
    return [share / sum(energy) for share in shares]


@pytest.mark.parametrize("bins", [1, 3, 10])
def test_profiles_against_slivers(bins: int) -> None:
    widths, energy = [5.0, 2.0, 2.0, 0.5, 0.25, 0.0], [1.0, 0.0, 3.0, 2.0, 0.5, 0.25]
    found = profile(torch.tensor(widths), torch.tensor(energy), bins)
    assert found.tolist() == pytest.approx(slow(widths, energy, bins), abs=2e-3)
    assert float(found.sum()) == pytest.approx(1)


def test_energy_in_proportion_to_the_widths_is_level() -> None:
    widths = drawn(4, 30).square().sort(descending=True).values
    assert profile(widths, 3 * widths).tolist() == pytest.approx([0.1] * 10)


def test_energy_at_the_ends_stays_there() -> None:
    widths = torch.ones(20)
    first, last = torch.zeros(20), torch.zeros(20)
    first[0], last[-1] = 1, 1
    assert profile(widths, first).tolist() == pytest.approx([1] + [0] * 9)
    assert profile(widths, last).tolist() == pytest.approx([0] * 9 + [1])


def test_directions_without_curvature_are_the_most_flexible() -> None:
    widths = torch.tensor([4.0, 0.0, 0.0])
    assert profile(widths, torch.tensor([0.0, 1.0, 1.0])).tolist() == pytest.approx([0] * 9 + [1])
    assert profile(torch.zeros(3), torch.ones(3)).tolist() == pytest.approx([0] * 9 + [1])
