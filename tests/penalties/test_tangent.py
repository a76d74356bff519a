"""LaLoRA's forms around the start: their dense definitions, autograd, and what they cannot see."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.penalties.test_kronecker import dense, draw, symmetric
from tests.reference.curvature_reference import block_matrix, coupled_matrix
from torch import Tensor

from keeptune.core.low_rank import LowRank
from keeptune.linalg.symmetric import Identity, PsdMatrix
from keeptune.penalties.base import Form
from keeptune.penalties.laplace import block_kronecker, coupled_kronecker, diagonal

M, N, R = 7, 9, 3
S, W = 1.7, 0.6
FACTORS: dict[str, tuple[PsdMatrix, PsdMatrix]] = {
    "dense": (symmetric(N, 1), symmetric(M, 2)),
    "act": (symmetric(N, 1), Identity(M, torch.tensor(2.0, dtype=torch.float64))),
}
FORMS = ["diag", "b-kfac", "b-tri-kfac"]
every_form = pytest.mark.parametrize("form", FORMS)
every_kind = pytest.mark.parametrize("kind", FACTORS)
every_start = pytest.mark.parametrize("zero", [False, True], ids=["B_0", "B_0 = 0"])
DELTA = LowRank(draw(M, R, seed=5), draw(R, N, seed=6))
MATRICES: dict[str, Callable[..., Tensor]] = {"b-kfac": block_matrix, "b-tri-kfac": coupled_matrix}


def start(zero: bool = False) -> LowRank:
    B = draw(M, R, seed=7)
    return LowRank(torch.zeros_like(B) if zero else B, draw(R, N, seed=8))


def matrix(form: str, kind: str, zero: bool) -> Tensor:
    """The whole quadratic form on ``(vec A, vec B)``, dense."""
    if form == "diag":
        fisher = fishers(zero)
        return torch.diag(torch.cat([fisher.A.reshape(-1), fisher.B.reshape(-1)]))
    Omega, Gamma = (dense(factor) for factor in FACTORS[kind])
    return MATRICES[form](Omega, Gamma, start(zero).B, start(zero).A, S)


def fishers(zero: bool) -> LowRank:
    """At B_0 = 0 the Fisher of A is zero."""
    return LowRank(draw(M, R, seed=1).square(), draw(R, N, seed=2).square() * (not zero))


def made(form: str, kind: str, zero: bool) -> Form:
    Omega, Gamma = FACTORS[kind]
    options: dict[str, Any] = {"scale": S, "weight": W, "start": start(zero)}
    if form == "diag":
        return diagonal(fishers(zero), W, start(zero))
    return (block_kronecker if form == "b-kfac" else coupled_kronecker)(Omega, Gamma, **options)


def dense_value(form: str, kind: str, zero: bool, B: Tensor, A: Tensor) -> Tensor:
    step = torch.cat([(A - start(zero).A).reshape(-1), (B - start(zero).B).reshape(-1)])
    return W * step @ matrix(form, kind, zero) @ step


@every_form
@every_kind
@every_start
def test_the_value_is_that_of_the_dense_matrix(form: str, kind: str, zero: bool) -> None:
    penalty, wanted = made(form, kind, zero), dense_value(form, kind, zero, DELTA.B, DELTA.A)
    torch.testing.assert_close(penalty(DELTA)[0], wanted, rtol=1e-12, atol=0)


@every_form
@every_kind
@every_start
def test_the_gradient_is_that_of_autograd(form: str, kind: str, zero: bool) -> None:
    penalty = made(form, kind, zero)
    B, A = DELTA.B.clone().requires_grad_(), DELTA.A.clone().requires_grad_()
    for value in (dense_value(form, kind, zero, B, A), penalty(LowRank(B, A))[0]):
        to_B, to_A = torch.autograd.grad(value, (B, A))
        _, found = penalty(DELTA)
        torch.testing.assert_close(found.B, to_B, rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(found.A, to_A, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("form", MATRICES)
@every_kind
@every_start
def test_the_whole_form_is_positive_semi_definite(form: str, kind: str, zero: bool) -> None:
    """The coupled one too: it is a Gram form. Its definition, and what the closed form says of unit steps."""
    whole = matrix(form, kind, zero)
    assert torch.linalg.eigvalsh(whole).min() > -1e-12 * whole.trace()
    penalty, base = made(form, kind, zero), start(zero)
    steps = torch.eye(whole.shape[0], dtype=torch.float64)
    columns = []
    for step in steps:
        delta = LowRank(base.B + step[R * N :].reshape(M, R), base.A + step[: R * N].reshape(R, N))
        _, grad = penalty(delta)
        columns.append(torch.cat([grad.A.reshape(-1), grad.B.reshape(-1)]) / (2 * W))
    torch.testing.assert_close(torch.stack(columns), whole, rtol=1e-10, atol=1e-11)


@every_form
@every_kind
@every_start
def test_at_the_start_value_and_gradient_are_zero(form: str, kind: str, zero: bool) -> None:
    value, grad = made(form, kind, zero)(start(zero))
    assert float(value) == 0.0
    assert not grad.B.any()
    assert not grad.A.any()


@every_form
@every_kind
def test_at_b_zero_the_papers_forms_cannot_see_a(form: str, kind: str) -> None:
    """While B stays where it started, A may go anywhere at no cost; and its gradient is zero wherever B is."""
    penalty, base = made(form, kind, True), start(True)
    for size in (1.0, 1e3):
        value, grad = penalty(LowRank(base.B, base.A + size * draw(R, N, seed=11)))
        assert float(value) == 0.0
        assert not grad.A.any()
        assert not grad.B.any()
    moved = penalty(DELTA)[0]
    assert moved > 0
    assert torch.equal(penalty(LowRank(DELTA.B, 5 * draw(R, N, seed=12)))[0], moved)
    assert not penalty(DELTA)[1].A.any()
    # Anywhere else they can.
    elsewhere = made(form, kind, False)
    assert elsewhere(LowRank(start().B, DELTA.A))[0] > 0


@every_kind
def test_at_b_zero_the_coupled_form_is_the_block_form(kind: str) -> None:
    block, coupled = made("b-kfac", kind, True), made("b-tri-kfac", kind, True)
    torch.testing.assert_close(coupled(DELTA)[0], block(DELTA)[0], rtol=1e-12, atol=0)
    torch.testing.assert_close(coupled(DELTA)[1].B, block(DELTA)[1].B)
    apart = made("b-kfac", kind, False)(DELTA)[0], made("b-tri-kfac", kind, False)(DELTA)[0]
    assert abs(float(apart[0] / apart[1]) - 1) > 1e-3


@every_kind
def test_gauge_directions_cost_nothing_in_the_coupled_form_alone(kind: str) -> None:
    """dA = G A_0, dB = -B_0 G changes no product to first order."""
    base, G = start(), 1e-2 * draw(R, R, seed=13)
    step = LowRank(base.B - base.B @ G, base.A + G @ base.A)
    coupled, block = made("b-tri-kfac", kind, False)(step)[0], made("b-kfac", kind, False)(step)[0]
    assert abs(float(coupled)) < 1e-12 * float(block)
