"""Some of a matrix's singular triplets without the others: from one end of the spectrum, or by random projection."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from keeptune.core.errors import StatisticsError
from keeptune.linalg.eigen import bottom_eigenvectors
from keeptune.linalg.svd import exact_svd, projected_svd, signed_triplets

__all__ = ["end_triplets", "random_triplets"]

_RESOLVED = 1e-7


def end_triplets(M: Tensor, r: int, end: Literal["top", "bottom"], where: str) -> tuple[Tensor, Tensor, Tensor]:
    """Find the r largest or the r smallest singular triplets.

    From r eigenvectors of the smaller Gram matrix in float64 and the thin SVD of M projected on them: several
    times faster than a full SVD, and a smaller error than that of a float32 one, whose smallest triplets are off by
    1e-7 of the largest singular value. Below that, where the Gram matrix ends, a full SVD in float64 is taken.

    Laws: ``M V == U diag(S)``, ``Mᵀ U == V diag(S)``; ``UᵀU == VᵀV == I``; S descends and lists the largest
    (smallest) of the min(m, n) singular values; the top triplets of rank min(m, n) make M.

    Args:
        M: ``(m, n)``.
        r: How many, 1 <= r <= min(m, n).
        end: Which end of the spectrum.
        where: The module's name, for the error message.

    Returns:
        ``U (m, r)``, ``S (r,)`` and ``Vᵀ (r, n)``, float64, the largest entry of each column of U positive.

    Raises:
        StatisticsError: M is not finite.
        ValueError: r is out of range.
    """
    if M.shape[0] < M.shape[1]:
        V, S, Uh = _end(M.T, r, end, where)
        return signed_triplets(Uh.T, S, V.T)
    return signed_triplets(*_end(M, r, end, where))


def _end(M: Tensor, r: int, end: Literal["top", "bottom"], where: str) -> tuple[Tensor, Tensor, Tensor]:
    M = M.double()
    gram = M.T @ M
    if not bool(torch.isfinite(gram.diagonal()).all()):
        raise StatisticsError(
            where, got="NaN or infinite entries", wanted="finite ones", next_step="Check the module's weights and data."
        )
    U, S, Vh = projected_svd(M, bottom_eigenvectors(-gram if end == "top" else gram, r)[1])
    if bool(S[-1] <= _RESOLVED * gram.trace().sqrt()):
        # The left vectors of zeros cannot be had from M V = 0.
        U, S, Vh = exact_svd(M, where)
        keep = slice(0, r) if end == "top" else slice(len(S) - r, None)
        return U[:, keep], S[keep], Vh[keep]
    return U, S, Vh


def random_triplets(
    M: Tensor, r: int, *, niter: int, generator: torch.Generator, extra: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    """Estimate the r largest singular triplets by subspace iteration from random vectors.

    Halko, Martinsson and Tropp, SIAM Review 2011, algorithms 4.4 and 5.1, with orthonormalisation at every step.
    Laws: exact for a matrix of rank at most r + extra; ``UᵀU == VᵀV == I``; equal generators give equal bits.

    Args:
        M: ``(m, n)``.
        r: How many.
        niter: Iterations; each multiplies by M and by Mᵀ and sharpens the subspace by (s_{r+extra+1} / s_r)².
        generator: Where the start comes from, on the CPU.
        extra: Vectors carried along beyond r.

    Returns:
        ``U (m, r)``, ``S (r,)`` descending and ``Vᵀ (r, n)``, in M's dtype, with signs as in
        :func:`end_triplets`.
    """
    columns = min(r + extra, *M.shape)
    start = torch.randn(M.shape[1], columns, generator=generator, dtype=M.dtype).to(M.device)
    Q = torch.linalg.qr(M @ start)[0]
    for _ in range(niter):
        Q = torch.linalg.qr(M @ torch.linalg.qr(M.T @ Q)[0])[0]
    U, S, Vh = torch.linalg.svd(Q.T @ M, full_matrices=False)
    return signed_triplets((Q @ U)[:, :r], S[:r], Vh[:r])
