from __future__ import annotations

from typing import Literal

import pytest
import torch
from tests.methods.support import SHAPES, UNIQUE, WEIGHTS, normal, weight, with_singular_values
from tests.models import relative
from torch import Tensor

from keeptune.core.errors import StatisticsError
from keeptune.linalg.decompositions import end_triplets

End = Literal["top", "bottom"]
ends = pytest.mark.parametrize("end", ["top", "bottom"])
shapes = pytest.mark.parametrize("shape", SHAPES)
weights = pytest.mark.parametrize("name", WEIGHTS)


def full(M: Tensor, r: int, end: End) -> tuple[Tensor, Tensor, Tensor]:
    """The definition: a whole SVD, cut."""
    U, S, Vh = torch.linalg.svd(M.double(), full_matrices=False)
    keep = slice(0, r) if end == "top" else slice(len(S) - r, None)
    return U[:, keep], S[keep], Vh[keep]


@ends
@shapes
@weights
@pytest.mark.parametrize("r", [1, 5, 16])
def test_triplets_are_triplets_of_the_wanted_end(end: End, shape: str, name: str, r: int) -> None:
    M = weight(name, shape).double()
    U, S, Vh = end_triplets(M, r, end, "up")
    size = torch.linalg.svdvals(M)[0]
    eye = torch.eye(r, dtype=torch.float64)
    assert relative(U.T @ U, eye) < 1e-12
    assert relative(Vh @ Vh.T, eye) < 1e-12
    assert float((M @ Vh.T - U * S).norm()) < 1e-9 * float(size)
    assert float((M.T @ U - Vh.T * S).norm()) < 1e-9 * float(size)
    assert float((S - full(M, r, end)[1]).abs().max()) < 1e-11 * float(size)
    assert (S.diff() <= 0).all()


@ends
@shapes
@pytest.mark.parametrize("name", UNIQUE)
def test_triplets_are_those_of_a_whole_svd(end: End, shape: str, name: str) -> None:
    M = weight(name, shape).double()
    U, S, Vh = end_triplets(M, 4, end, "up")
    P, _, Qh = full(M, 4, end)
    assert relative(U @ U.T, P @ P.T) < 1e-7
    assert relative(Vh.T @ Vh, Qh.T @ Qh) < 1e-7
    assert relative((U * S) @ Vh, (P * S) @ Qh) < 1e-7


@shapes
@weights
def test_all_triplets_make_the_matrix(shape: str, name: str) -> None:
    M = weight(name, shape).double()
    U, S, Vh = end_triplets(M, min(M.shape), "top", "up")
    assert relative((U * S) @ Vh, M) < 1e-12


@ends
def test_values_below_what_a_gram_matrix_resolves_are_right(end: End) -> None:
    """The eigenvalues of Mᵀ M reach down to 1e-16 of the largest, the singular values of M to 1e-16 too."""
    M = with_singular_values((30, 20), torch.logspace(0, -11, 20, dtype=torch.float64))
    U, S, Vh = end_triplets(M, 6, end, "up")
    P, wanted, _ = full(M, 6, end)
    assert float(((S - wanted) / wanted).abs().max()) < 1e-4
    assert relative(U @ U.T, P @ P.T) < 1e-4
    assert float((M.T @ U - Vh.T * S).norm()) < 1e-12


@ends
def test_the_minor_triplets_of_a_falling_spectrum_are_closer_than_those_of_float32(end: End) -> None:
    M = with_singular_values((40, 40), torch.logspace(0, -5, 40)).float()
    P = full(M, 4, end)[0]
    U = end_triplets(M, 4, end, "up")[0]
    Q = torch.linalg.svd(M)[0][:, :4] if end == "top" else torch.linalg.svd(M)[0][:, -4:]
    assert relative(U @ U.T, P @ P.T) < 0.01 * relative(Q @ Q.T, P @ P.T)


@ends
def test_a_matrix_of_zeros_has_orthonormal_vectors_and_zeros(end: End) -> None:
    U, S, Vh = end_triplets(torch.zeros(6, 4), 3, end, "up")
    assert not S.any()
    assert relative(U.T @ U, torch.eye(3)) < 1e-12
    assert relative(Vh @ Vh.T, torch.eye(3)) < 1e-12


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused_with_the_module(bad: float) -> None:
    M = normal(6, 9)
    M[2, 3] = bad
    with pytest.raises(StatisticsError, match=r"model\.layers\.1\.up: got NaN or infinite"):
        end_triplets(M, 2, "top", "model.layers.1.up")


@shapes
def test_signs_do_not_depend_on_the_solver(shape: str) -> None:
    M = weight("random", shape).double()
    for U in (end_triplets(M, 4, "top", "up")[0], end_triplets(M, 4, "bottom", "up")[0]):
        assert (U.gather(0, U.abs().argmax(0, keepdim=True)) > 0).all()
