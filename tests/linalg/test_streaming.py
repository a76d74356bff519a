"""Streaming top directions against the eigenvectors of the whole matrix."""

from __future__ import annotations

import pytest
import torch
from tests.models import relative
from torch import Tensor

from keeptune.linalg.streaming_eigen import TopDirections, Truncated, sum_size

CPU = torch.device("cpu")
N = 48


def rows(count: int = 900, n: int = N, decay: float = 1.0, seed: int = 0) -> Tensor:
    """Rows whose covariance has eigenvalues that fall as a power."""
    draw = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(n, n, generator=draw, dtype=torch.float64))[0]
    spread = torch.arange(1, n + 1, dtype=torch.float64) ** (-decay / 2)
    return (torch.randn(count, n, generator=draw, dtype=torch.float64) * spread) @ basis.T


def found(X: Tensor, rank: int, split: int = 10_000, seed: int = 0) -> Truncated:
    top = TopDirections(X.shape[1], rank, CPU, seed)
    for part in X.split(split):
        top.add(part)
    return top.truncated()


def top_and_diagonal(F: Tensor, rank: int) -> Tensor:
    """The top eigenvectors as they are, and the diagonal of what they leave."""
    values, U = torch.linalg.eigh(F)
    top = (U[:, -rank:] * values[-rank:]) @ U[:, -rank:].T
    return top + torch.diag((F - top).diagonal())


def whole(X: Tensor) -> Tensor:
    return X.T @ X / X.shape[0]


def test_with_all_directions_it_is_the_whole_matrix() -> None:
    for decay in (0.0, 1.0, 4.0):
        X = rows(decay=decay)
        assert relative(found(X, N).factor.dense(), whole(X)) < 1e-5
        assert relative(found(X, N + 5).factor.dense(), whole(X)) < 1e-5
        assert found(X, N).error < 1e-5


@pytest.mark.parametrize("decay", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("rank", [1, 4, 12])
def test_it_is_near_the_best_of_its_form(decay: float, rank: int) -> None:
    """The rows are many times what the buffer holds."""
    X = rows(3000, decay=decay)
    F = whole(X)
    error = relative(found(X, rank).factor.dense(), F)
    assert error < 1.1 * relative(top_and_diagonal(F, rank), F) + 1e-6


@pytest.mark.parametrize("decay", [0.5, 2.0])
def test_the_diagonal_is_exact_and_nothing_is_counted_twice(decay: float) -> None:
    X = rows(2000, decay=decay)
    F, factor = whole(X), found(X, 5).factor
    torch.testing.assert_close(factor.dense().diagonal(), F.diagonal(), rtol=1e-5, atol=0)
    assert float((factor.trace() / F.trace()).log().abs()) < 1e-6
    assert float((factor.share() - factor.values.sum() / F.trace()).abs()) < 1e-6
    spread = torch.linalg.eigvalsh(F - (factor.U * factor.values) @ factor.U.T)
    assert spread.min() > -1e-6 * F.trace()
    assert factor.rest.min() >= 0
    torch.testing.assert_close(factor.U.T @ factor.U, torch.eye(5, dtype=torch.float64))


def test_a_diagonal_tells_apart_what_one_number_cannot() -> None:
    """Features of unequal size outside the top directions: the change that hits the small ones is cheap."""
    X = rows(2000, decay=0.0) * torch.logspace(0, -2, N, dtype=torch.float64)
    F, factor = whole(X), found(X, 4).factor
    change = torch.eye(N, dtype=torch.float64)[-8:]
    true, told = (change @ matrix @ change.T for matrix in (F, factor.dense()))
    one_number = (F.trace() - factor.values.sum()) / (N - 4) * 8
    assert float(told.trace() / true.trace()) == pytest.approx(1, abs=1e-3)
    assert one_number > 100 * true.trace()


def test_how_rows_are_split_does_not_matter() -> None:
    X = rows(700)
    at_once = found(X, 4).factor.dense()
    for split in (1, 7, 36, 350):
        assert relative(found(X, 4, split).factor.dense(), at_once) < 1e-5


def test_order_matters_by_less_than_the_error_it_tells() -> None:
    X = rows(2000)
    there, back = found(X, 4), found(X.flip(0), 4)
    assert relative(there.factor.dense(), back.factor.dense()) < 0.4 * there.error


@pytest.mark.parametrize("rank", [2, 8, 24])
def test_the_error_that_is_told_is_the_error(rank: int) -> None:
    """Its square is unbiased over the seed of the probes."""
    X = rows(800)
    F = whole(X)
    told = torch.tensor([found(X, rank, seed=seed).error for seed in range(12)])
    true = relative(found(X, rank).factor.dense(), F)
    assert abs(float(told.square().mean().sqrt()) / true - 1) < 0.15
    assert (told / true - 1).abs().max() < 0.6


def test_fewer_tokens_than_directions() -> None:
    X = rows(3)
    made = found(X, 8)
    assert relative(made.factor.dense(), whole(X)) < 1e-5
    torch.testing.assert_close(made.factor.U.T @ made.factor.U, torch.eye(8, dtype=torch.float64))


def test_rows_that_repeat_or_vanish() -> None:
    """The buffer then has a lower rank than it has rows."""
    X = rows(4).repeat(100, 1)
    assert relative(found(X, 4).factor.dense(), whole(X)) < 1e-5
    made = found(torch.zeros(200, N), 3)
    assert made.factor.trace() == 0
    assert made.factor.share() == 1
    assert made.error == 0


def test_no_matrix_of_n_by_n_is_held() -> None:
    top = TopDirections(512, 4, CPU)
    top.add(rows(100, 8).repeat(1, 64))
    held = [value for value in vars(top).values() if isinstance(value, Tensor)]
    assert max(value.numel() for value in held) == 24 * 512
    assert sum(value.nbytes for value in held) == 8 * sum_size(4, 512)


def test_the_seed_decides() -> None:
    X = rows(500)
    assert torch.equal(found(X, 4, seed=1).factor.U, found(X, 4, seed=1).factor.U)
    assert found(X, 4, seed=1).error != found(X, 4, seed=2).error
