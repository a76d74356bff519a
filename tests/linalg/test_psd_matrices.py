"""Factors: every kind obeys the laws of the dense matrix it stands for."""

import pytest
import torch

from keeptune.linalg.symmetric import Dense, Identity, LowRankDiagonal, PsdMatrix, psd_matrix_from

N = 7


def _factors() -> dict[str, PsdMatrix]:
    draw = torch.Generator().manual_seed(0)
    root = torch.randn(N, N, generator=draw, dtype=torch.float64)
    U, _ = torch.linalg.qr(torch.randn(N, 3, generator=draw, dtype=torch.float64))
    values = torch.tensor([5.0, 2.0, 0.5], dtype=torch.float64)
    return {
        "identity": Identity(N, torch.tensor(0.7, dtype=torch.float64)),
        "dense": Dense(root @ root.T),
        "low_rank_diagonal": LowRankDiagonal(U, values, torch.linspace(0.0, 0.6, N, dtype=torch.float64)),
        "low_rank_only": LowRankDiagonal(U, values, torch.zeros(N, dtype=torch.float64)),
    }


KINDS = list(_factors())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rho", [0.0, 0.3, 1.0])
def test_apply_and_trace_are_those_of_the_dense_matrix(kind, rho):
    factor = _factors()[kind].damped(rho)
    X = torch.randn(N, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.allclose(factor.apply(X), factor.dense() @ X, rtol=0, atol=1e-12)
    assert torch.allclose(factor.trace(), factor.dense().trace(), rtol=1e-12)
    assert factor.size == N


@pytest.mark.parametrize("kind", KINDS)
def test_a_factor_is_symmetric_and_positive_semi_definite(kind):
    matrix = _factors()[kind].dense()
    assert torch.allclose(matrix, matrix.T, rtol=0, atol=1e-14)
    assert torch.linalg.eigvalsh(matrix).min() > -1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rho", [0.0, 0.25, 1.0])
def test_damping_mixes_with_the_identity_of_the_same_trace(kind, rho):
    factor = _factors()[kind]
    before = factor.dense().clone()
    wanted = (1 - rho) * before + rho * before.trace() / N * torch.eye(N, dtype=torch.float64)
    assert torch.allclose(factor.damped(rho).dense(), wanted, rtol=0, atol=1e-12)
    assert torch.equal(factor.dense(), before), "damping changed the factor it was asked of"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rho", [-0.1, 1.1])
def test_damping_outside_its_range_is_refused(kind, rho):
    with pytest.raises(ValueError, match="rho"):
        _factors()[kind].damped(rho)


@pytest.mark.parametrize("kind", KINDS)
def test_a_factor_survives_its_tensors_among_others(kind):
    factors = _factors()
    stored = {name: t for other in KINDS for name, t in factors[other].tensors(f"{other}.").items()}
    found = psd_matrix_from(stored, f"{kind}.")
    assert type(found) is type(factors[kind])
    assert torch.equal(found.dense(), factors[kind].dense())


def test_a_missing_factor_is_named():
    with pytest.raises(KeyError, match="Omega"):
        psd_matrix_from(_factors()["dense"].tensors("Gamma."), "Omega.")


@pytest.mark.parametrize("kind", KINDS)
def test_conversion_changes_the_dtype_of_all_parts(kind):
    factor = _factors()[kind].to(torch.float32)
    assert factor.dense().dtype == factor.trace().dtype == torch.float32
    assert factor.apply(torch.ones(N, 1)).dtype == torch.float32


def test_the_share_is_of_the_whole_trace():
    factors = _factors()
    assert torch.allclose(factors["low_rank_diagonal"].share(), torch.tensor(7.5 / 9.6, dtype=torch.float64))
    assert factors["low_rank_only"].share() == 1


@pytest.mark.parametrize("rest", [0.0, 1e-4, 1.0])
def test_halved_directions_leave_the_diagonal_and_are_positive_semi_definite(rest):
    """Where rounding adds to a diagonal without a rest, it must be taken back from the directions."""
    draw = torch.Generator().manual_seed(3)
    U = torch.linalg.qr(torch.randn(300, 40, generator=draw))[0]
    factor = LowRankDiagonal(U, torch.rand(40, generator=draw) * 9, torch.rand(300, generator=draw) * rest)
    halved = factor.halved()
    assert halved.U.dtype == torch.bfloat16
    assert halved.rest.min() >= 0
    if rest:
        torch.testing.assert_close(halved.dense().diagonal(), factor.dense().diagonal(), rtol=1e-6, atol=0)
    assert float((halved.dense() - factor.dense()).norm() / factor.dense().norm()) < 0.01
    X = torch.randn(300, 4, generator=draw)
    torch.testing.assert_close(halved.apply(X), halved.dense() @ X, rtol=1e-4, atol=1e-4)
    stored = psd_matrix_from(halved.tensors("a."), "a.")
    assert torch.equal(stored.dense(), halved.dense())
    again = halved.halved()
    assert torch.equal(again.U, halved.U)


def test_a_plan_of_before_the_diagonal_is_read_as_it_was():
    U = torch.linalg.qr(torch.randn(N, 3, generator=torch.Generator().manual_seed(0)))[0]
    values, remainder = torch.tensor([5.0, 2.0, 0.5]), torch.tensor(0.25)
    found = psd_matrix_from({"a.U": U, "a.values": values, "a.remainder": remainder}, "a.")
    torch.testing.assert_close(found.dense(), (U * values) @ U.T + remainder * (torch.eye(N) - U @ U.T))
