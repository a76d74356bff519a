"""Where a change lies against a curvature, against slow sums over dense matrices."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from keeptune.core.low_rank import LowRank
from keeptune.linalg.curvature_profile import directions, energies, profile
from keeptune.linalg.symmetric import Dense, Identity, LowRankDiagonal, PsdMatrix

N = 12


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def dense() -> Dense:
    root = drawn(0, N, N)
    return Dense(root @ root.T)


def low_rank() -> LowRankDiagonal:
    U = torch.linalg.qr(drawn(1, N, 3)).Q
    values = torch.tensor([2.0, 9.0, 5.0], dtype=torch.float64)
    return LowRankDiagonal(U, values, torch.full((N,), 0.25, dtype=torch.float64))


FACTORS: dict[str, PsdMatrix] = {"dense": dense(), "low rank": low_rank()}
CHANGE = LowRank(drawn(2, 7, 2), drawn(3, 2, N))


@pytest.mark.parametrize("kind", FACTORS)
def test_directions_are_eigenvectors_from_the_stiffest_on(kind: str) -> None:
    F = FACTORS[kind]
    found = directions(F)
    assert found is not None
    assert float(found.counts.sum()) == N
    assert float((found.values * found.counts).sum()) == pytest.approx(float(F.trace()))
    assert (found.values.diff() <= 0).all()
    k = found.U.shape[1]
    torch.testing.assert_close(F.dense() @ found.U, found.U * found.values[:k])


def test_beside_a_diagonal_directions_are_the_ritz_vectors_of_the_matrix() -> None:
    F = LowRankDiagonal(low_rank().U, low_rank().values, torch.linspace(0, 1, N, dtype=torch.float64))
    found = directions(F)
    assert found is not None
    k = found.U.shape[1]
    assert float((found.values * found.counts).sum()) == pytest.approx(float(F.trace()))
    torch.testing.assert_close(found.U.T @ F.dense() @ found.U, torch.diag(found.values[:k]))
    torch.testing.assert_close(found.U @ found.U.T, F.U @ F.U.T)
    halved = directions(F.halved())
    assert halved is not None
    torch.testing.assert_close(halved.values, found.values, rtol=0.02, atol=0.02)


def test_a_multiple_of_the_identity_has_no_directions() -> None:
    assert directions(Identity(N, torch.tensor(2.0))) is None


@pytest.mark.parametrize("kind", FACTORS)
@pytest.mark.parametrize("form", ["factors", "matrix"])
def test_energies_are_those_of_the_dense_change(kind: str, form: str) -> None:
    E = CHANGE.dense()
    along = directions(FACTORS[kind])
    assert along is not None
    found = energies(CHANGE if form == "factors" else E, along)
    wanted = [float((E @ u).square().sum()) for u in along.U.T]
    outside = E - E @ along.U @ along.U.T
    wanted += [float(outside.square().sum())] * (len(along.values) - len(wanted))
    assert found.tolist() == pytest.approx(wanted, abs=1e-9)
    assert float(found.sum()) == pytest.approx(float(E.square().sum()))
    felt = float((found * along.values).sum())
    assert felt == pytest.approx(float((E @ FACTORS[kind].dense() @ E.T).trace()), rel=1e-9), "tr(E F Eᵀ)"


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
