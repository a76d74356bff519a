"""Eigenvectors, signs and projected SVDs: their laws, and the null space in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.models import relative
from torch import Tensor

from keeptune.linalg.decompositions import bottom_eigenvectors, canonical_signs, projected_svd

quick = settings(max_examples=30, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31 - 1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(n: int, r: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(normal(n, r, seed=seed))[0]


def with_spectrum(values: Tensor, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A symmetric matrix with these ascending eigenvalues, and its eigenvectors."""
    Q = orthonormal(len(values), len(values), seed)
    return (Q * values) @ Q.T, Q


# bottom_eigenvectors


@quick
@given(st.integers(1, 12), st.data(), seeds)
def test_bottom_eigenvectors_are_eigenvectors_of_the_smallest_values(n: int, data: st.DataObject, seed: int) -> None:
    r = data.draw(st.integers(1, n))
    C = normal(n, n, seed=seed)
    C = C + C.T
    values, U = bottom_eigenvectors(C, r)
    torch.testing.assert_close(C @ U, U * values, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(U.T @ U, torch.eye(r, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(C)[:r], rtol=1e-9, atol=1e-9)


def test_a_bottom_of_1e_12_of_the_top_is_resolved() -> None:
    values = torch.cat([torch.logspace(-12, -11, 4, dtype=torch.float64), torch.linspace(0.1, 1, 20).double()])
    C, Q = with_spectrum(values)
    found, U = bottom_eigenvectors(C, 4)
    assert relative(U @ U.T, Q[:, :4] @ Q[:, :4].T) < 1e-12
    torch.testing.assert_close(found, values[:4], rtol=1e-3, atol=0)
    in_float32 = torch.linalg.eigh(C.float())[0][:4].double()
    assert (in_float32 - values[:4]).abs().max() > 10 * values[3]  # what float64 is for


def test_an_exact_null_space_is_found() -> None:
    X = normal(6, 15)
    _, U = bottom_eigenvectors(X.T @ X, 9)
    assert (X @ U).norm() < 1e-12 * X.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bottom_eigenvectors_come_in_float64_and_contiguous(dtype: torch.dtype) -> None:
    values, U = bottom_eigenvectors(torch.eye(5, dtype=dtype), 3)
    assert values.dtype == U.dtype == torch.float64
    assert U.is_contiguous()


@pytest.mark.parametrize("r", [-1, 0, 6])
def test_a_rank_out_of_range_is_refused(r: int) -> None:
    with pytest.raises(ValueError, match=f"got r = {r}, wanted 1 <= r <= 5"):
        bottom_eigenvectors(torch.eye(5), r)


# canonical_signs


@quick
@given(st.integers(1, 8), st.integers(1, 8), seeds)
def test_signs_are_canonical_whatever_they_were(n: int, r: int, seed: int) -> None:
    U = normal(n, r, seed=seed)
    flips = torch.where(normal(r, seed=seed + 1) < 0, -1.0, 1.0).double()
    found = canonical_signs(U)
    assert torch.equal(canonical_signs(U * flips), found)
    assert torch.equal(found.abs(), U.abs())
    assert (found.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()


def test_a_column_of_zeros_keeps_its_zeros() -> None:
    assert torch.equal(canonical_signs(torch.zeros(3, 2)), torch.zeros(3, 2))


# projected_svd


@quick
@given(st.integers(1, 10), st.integers(1, 10), st.data(), seeds)
def test_projected_svd_is_the_full_svd_of_the_projected_weight(m: int, n: int, data: st.DataObject, seed: int) -> None:
    r = data.draw(st.integers(1, n))
    W, U = normal(m, n, seed=seed), orthonormal(n, r, seed + 1)
    dense = W @ U @ U.T
    P, S, Vh = projected_svd(W, U)
    k = min(m, r)
    assert (P.shape, S.shape, Vh.shape) == ((m, k), (k,), (k, n))
    torch.testing.assert_close((P * S) @ Vh, dense, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(S, torch.linalg.svdvals(dense)[:k], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(P.T @ P, torch.eye(k, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(Vh @ Vh.T, torch.eye(k, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_right_vectors_lie_in_the_span_that_was_projected_on() -> None:
    W, U = normal(7, 9), orthonormal(9, 4, 1)
    _, _, Vh = projected_svd(W, U)
    torch.testing.assert_close(Vh @ U @ U.T, Vh, rtol=1e-12, atol=1e-12)


def test_a_weight_that_ignores_some_directions_has_zero_singular_values() -> None:
    U = orthonormal(9, 4)
    W = normal(7, 9) @ (torch.eye(9).double() - U[:, :2] @ U[:, :2].T)
    P, S, Vh = projected_svd(W, U)
    assert S[2:].max() < 1e-14 * S[0]
    torch.testing.assert_close((P * S) @ Vh, W @ U @ U.T, rtol=1e-12, atol=1e-12)


def test_a_float32_weight_is_decomposed_in_the_dtype_of_the_basis() -> None:
    W, U = normal(7, 9).float(), orthonormal(9, 4)
    P, S, Vh = projected_svd(W, U)
    assert P.dtype == S.dtype == Vh.dtype == torch.float64
    assert relative((P * S) @ Vh, W.double() @ U @ U.T) < 1e-14
