"""The penalties on the weight change: their definition, autograd, and what they must not depend on."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from tests.reference import penalty_reference as reference
from torch import Tensor

from keeptune.core.low_rank import LowRank
from keeptune.linalg.symmetric import Identity, PsdMatrix
from keeptune.penalties.kronecker import kronecker_change

M, N, R = 7, 9, 3


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def symmetric(size: int, seed: int) -> Tensor:
    X = draw(2 * size, size, seed=seed)
    return X.T @ X / (2 * size)


def dense(F: PsdMatrix) -> Tensor:
    return F if isinstance(F, Tensor) else torch.eye(F.size, dtype=torch.float64) * F.scale


def factors(kind: str) -> tuple[PsdMatrix, PsdMatrix]:
    """Ω and Γ."""
    one = torch.ones((), dtype=torch.float64)
    return {
        "identity": (Identity(N, one), Identity(M, one)),
        "act": (symmetric(N, 1), Identity(M, 2 * one)),
        "dense": (symmetric(N, 1), symmetric(M, 2)),
    }[kind]


every_kind = pytest.mark.parametrize("kind", ["identity", "act", "dense"])
every_start = pytest.mark.parametrize("started", [False, True], ids=["B_0 = 0", "B_0 A_0"])


class Case(NamedTuple):
    Omega: PsdMatrix
    Gamma: PsdMatrix
    scale: float
    weight: float
    start: LowRank | None

    def __call__(self, delta: LowRank) -> tuple[Tensor, LowRank]:
        return kronecker_change(*self)(delta)


def case(kind: str, started: bool) -> tuple[Case, LowRank]:
    Omega, Gamma = factors(kind)
    start = LowRank(draw(M, R, seed=7), draw(R, N, seed=8)) if started else None
    return Case(Omega, Gamma, 1.7, 0.6, start), LowRank(draw(M, R, seed=5), draw(R, N, seed=6))


def dense_value(penalty: Case, B: Tensor, A: Tensor) -> Tensor:
    start = () if penalty.start is None else (penalty.start.B, penalty.start.A)
    E = reference.change(B, A, penalty.scale, *start)
    return penalty.weight * reference.quadratic(E, dense(penalty.Omega), dense(penalty.Gamma))


@every_kind
@every_start
def test_the_value_is_that_of_the_dense_change(kind: str, started: bool) -> None:
    penalty, delta = case(kind, started)
    wanted = dense_value(penalty, delta.B, delta.A)
    torch.testing.assert_close(penalty(delta)[0], wanted, rtol=1e-12, atol=0)


@every_kind
@every_start
def test_the_gradient_is_that_of_autograd(kind: str, started: bool) -> None:
    penalty, delta = case(kind, started)
    B, A = delta.B.requires_grad_(), delta.A.requires_grad_()
    to_B, to_A = reference.gradients(dense_value(penalty, B, A), B, A)
    with torch.no_grad():
        _, found = penalty(delta)
    torch.testing.assert_close(found.B, to_B, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.A, to_A, rtol=1e-10, atol=1e-12)


@every_kind
@every_start
def test_another_split_of_the_same_change_has_the_same_value(kind: str, started: bool) -> None:
    """Gauge: (B G⁻¹, G A) changes no penalty on the change."""
    penalty, delta = case(kind, started)
    G = draw(R, R, seed=9) + 3 * torch.eye(R)
    other = LowRank(delta.B @ torch.linalg.inv(G), G @ delta.A)
    torch.testing.assert_close(penalty(other)[0], penalty(delta)[0], rtol=1e-10, atol=0)


@every_kind
def test_at_the_start_value_and_gradient_are_zero(kind: str) -> None:
    penalty, _ = case(kind, True)
    assert penalty.start is not None
    value, grad = penalty(penalty.start)
    assert float(value) == 0.0
    assert not grad.B.any()
    assert not grad.A.any()
    bare, delta = case(kind, False)
    value, grad = bare(LowRank(torch.zeros_like(delta.B), delta.A))
    assert float(value) == 0.0
    assert not grad.B.any()
    assert not grad.A.any()


def test_a_small_step_from_a_large_start_keeps_its_digits_in_float32() -> None:
    """B A - B_0 A_0, formed as it is written, would lose them: the step is 1e-5 of the start."""
    penalty, _ = case("dense", True)
    assert penalty.start is not None
    B, A = penalty.start.B + 1e-5 * draw(M, R, seed=1), penalty.start.A + 1e-5 * draw(R, N, seed=2)
    B, A = B.float(), A.float()
    single = Case(dense(penalty.Omega).float(), dense(penalty.Gamma).float(), 1.7, 0.6, penalty.start.to(torch.float32))
    start = single.start
    assert start is not None
    E = reference.change(B.double(), A.double(), 1.7, start.B.double(), start.A.double())
    wanted = 0.6 * reference.quadratic(E, dense(penalty.Omega), dense(penalty.Gamma))
    assert float(single(LowRank(B, A))[0]) == pytest.approx(float(wanted), rel=1e-4)
    plain = 0.6 * 1.7**2 * (B @ A - start.B @ start.A).double()
    assert abs(float((plain - 0.6 * 1.7 * E).norm() / (0.6 * 1.7 * E).norm())) > 1e-3


def test_feature_drift_is_the_mean_squared_change_of_the_output() -> None:
    """tr(E Ω Eᵀ) = E‖E h‖² with Ω = E[h hᵀ]."""
    h = draw(50, N, seed=11)
    form = kronecker_change(h.T @ h / 50, Identity(M, torch.ones((), dtype=torch.float64)), 2.0, 1.0)
    delta = LowRank(draw(M, R, seed=5), draw(R, N, seed=6))
    wanted = (h @ (2.0 * delta.dense()).T).square().sum(dim=1).mean()
    torch.testing.assert_close(form(delta)[0], wanted, rtol=1e-12, atol=0)
