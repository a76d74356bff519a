from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models import relative

from keeptune.core.low_rank import LowRank

sizes = st.integers(1, 9)
seeds = st.integers(0, 2**31 - 1)
quick = settings(max_examples=40, deadline=None, derandomize=True)


def change(m: int, r: int, n: int, seed: int) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(
        B=torch.randn(m, r, generator=generator, dtype=torch.float64),
        A=torch.randn(r, n, generator=generator, dtype=torch.float64),
    )


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@quick
@given(sizes, sizes, sizes, sizes, seeds)
def test_minus_is_the_difference_of_the_products(m: int, r: int, k: int, n: int, seed: int) -> None:
    x, y = change(m, r, n, seed), change(m, k, n, seed + 1)
    found = x.minus(y)
    close(found.dense(), x.dense() - y.dense())
    assert found.rank == r + k


@quick
@given(sizes, sizes, sizes, sizes, seeds)
def test_plus_is_the_sum_of_the_products(m: int, r: int, k: int, n: int, seed: int) -> None:
    x, y = change(m, r, n, seed), change(m, k, n, seed + 1)
    found = x.plus(y)
    close(found.dense(), x.dense() + y.dense())
    assert found.rank == r + k
    assert x.plus(LowRank(y.B[:, :1] @ x.A.new_ones(1, x.rank), x.A)).rank == x.rank


@quick
@given(sizes, sizes, sizes, seeds, st.sampled_from("AB"))
def test_minus_keeps_the_rank_when_a_factor_is_shared(m: int, r: int, n: int, seed: int, shared: str) -> None:
    x, other = change(m, r, n, seed), change(m, r, n, seed + 1)
    y = LowRank(other.B, x.A) if shared == "A" else LowRank(x.B, other.A)
    found = x.minus(y)
    close(found.dense(), x.dense() - y.dense())
    assert found.rank == r


@quick
@given(sizes, sizes, sizes, seeds, st.floats(-1e3, 1e3))
def test_scaled_multiplies_the_product(m: int, r: int, n: int, seed: int, factor: float) -> None:
    x = change(m, r, n, seed)
    torch.testing.assert_close(x.scaled(factor).dense(), factor * x.dense(), rtol=1e-10, atol=1e-7)
    assert x.scaled(factor).A is x.A


@quick
@given(sizes, sizes, sizes, st.integers(0, 5), seeds)
def test_padded_is_the_same_change_at_a_larger_rank(m: int, r: int, n: int, extra: int, seed: int) -> None:
    x = change(m, r, n, seed)
    found = x.padded(r + extra)
    assert found.rank == r + extra
    close(found.dense(), x.dense())


@quick
@given(sizes, sizes, sizes, sizes, seeds)
def test_truncated_is_the_nearest_change_of_that_rank(m: int, r: int, n: int, k: int, seed: int) -> None:
    """Eckart-Young: the error is the norm of the singular values left out, and no product reaches less."""
    x = change(m, r, n, seed)
    U, S, Vh = torch.linalg.svd(x.dense(), full_matrices=False)
    found = x.truncated(k)
    close(found.dense(), (U[:, :k] * S[:k]) @ Vh[:k])
    close((found.dense() - x.dense()).norm(), S[k:].norm())
    assert found.rank <= k


@quick
@given(sizes, sizes, sizes, sizes, seeds)
def test_truncated_factors_are_balanced(m: int, r: int, n: int, k: int, seed: int) -> None:
    found = change(m, r, n, seed).truncated(k)
    close(found.B.T @ found.B, found.A @ found.A.T)


@quick
@given(sizes, sizes, sizes, seeds)
def test_norm_squared_is_the_sum_of_squared_entries(m: int, r: int, n: int, seed: int) -> None:
    x = change(m, r, n, seed)
    torch.testing.assert_close(x.norm_squared(), (x.dense() ** 2).sum(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("B", "A", "zero"),
    [(0.0, 1.0, True), (1.0, 0.0, True), (0.0, 0.0, True), (1.0, 1.0, False), (float("nan"), 1.0, False)],
)
def test_is_zero_when_a_factor_is(B: float, A: float, zero: bool) -> None:
    assert LowRank(torch.full((3, 2), B), torch.full((2, 4), A)).is_zero is zero


def test_shape_and_rank_are_those_of_the_factors() -> None:
    x = change(5, 2, 7, 0)
    assert x.shape == (5, 7) == tuple(x.dense().shape)
    assert x.rank == 2


def test_truncated_works_in_float64_and_returns_the_dtype_of_the_factors() -> None:
    x = change(9, 6, 8, 1)
    found = x.to(torch.float32).truncated(3)
    assert found.B.dtype == found.A.dtype == torch.float32
    assert relative(found.dense(), x.truncated(3).dense()) < 1e-6


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: LowRank(torch.zeros(3, 2), torch.zeros(3, 4)),
        lambda: LowRank(torch.zeros(3), torch.zeros(3, 4)),
        lambda: LowRank(torch.zeros(3, 2), torch.zeros(2)),
        lambda: change(3, 2, 4, 0).minus(change(3, 2, 5, 0)),
        lambda: change(3, 2, 4, 0).minus(change(4, 2, 4, 0)),
        lambda: change(3, 4, 4, 0).padded(3),
    ],
    ids=["ranks", "vector-B", "vector-A", "minus-columns", "minus-rows", "padded-smaller"],
)
def test_factors_that_do_not_fit_are_refused(wrong: Callable[[], LowRank]) -> None:
    with pytest.raises(ValueError, match="LowRank"):
        wrong()


def test_triplets_are_split_evenly() -> None:
    U = torch.linalg.qr(torch.randn(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[0]
    V = torch.linalg.qr(torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))[0]
    S = torch.tensor([4.0, 1.0, 0.0], dtype=torch.float64)
    found = LowRank.from_triplets(U, S, V.T)
    assert found.B.dtype == found.A.dtype == torch.float32
    assert torch.allclose(found.dense().double(), (U * S) @ V.T, atol=1e-6)
    for gram in (found.B.T @ found.B, found.A @ found.A.T):
        assert torch.allclose(gram.double(), torch.diag(S), atol=1e-6)
