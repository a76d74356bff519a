"""The bottom of a covariance's spectrum, in float64."""

from __future__ import annotations

import scipy.linalg
import torch
from torch import Tensor

__all__ = ["bottom_eigenvectors", "canonical_signs"]


def bottom_eigenvectors(C: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Find the eigenvectors of the r smallest eigenvalues of a symmetric matrix.

    float64, because rounding in float32 hides everything below 1e-7 of the largest eigenvalue, and with
    it the null space. On the CPU only the r wanted vectors are computed (LAPACK's dsyevr).

    Laws: ``C U == U diag(values)``; ``UᵀU == I``; values ascend and are the smallest there are.

    Args:
        C: ``(n, n)``, symmetric; only its lower triangle is read.
        r: How many, 1 <= r <= n.

    Returns:
        The eigenvalues ``(r,)``, ascending, and the eigenvectors as columns ``(n, r)``, both float64.

    Raises:
        ValueError: r is out of range.
    """
    n = C.shape[0]
    if not 1 <= r <= n:
        raise ValueError(f"bottom_eigenvectors: got r = {r}, wanted 1 <= r <= {n}")
    if C.device.type != "cpu":
        values, U = torch.linalg.eigh(C.double())
        return values[:r], canonical_signs(U[:, :r])
    # A column-major copy that LAPACK may overwrite saves two copies of an n x n matrix.
    matrix = C.to(torch.float64, copy=True).T.numpy()
    found, vectors = scipy.linalg.eigh(
        matrix, lower=False, subset_by_index=(0, r - 1), driver="evr", overwrite_a=True, check_finite=False
    )
    return torch.from_numpy(found), canonical_signs(torch.from_numpy(vectors))


def canonical_signs(U: Tensor) -> Tensor:
    """Make the largest entry of each column positive, so that a basis does not depend on the solver.

    Args:
        U: ``(n, r)``.

    Returns:
        ``U`` with some columns negated, ``(n, r)``, contiguous.
    """
    largest = U.gather(0, U.abs().argmax(dim=0, keepdim=True))
    return (U * torch.where(largest < 0, -1.0, 1.0).to(U.dtype)).contiguous()
