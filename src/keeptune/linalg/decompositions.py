"""Eigenvectors, singular triplets and spectra, whole or in part, with signs that do not depend on the solver."""

import logging
import math
from typing import Literal

import scipy.linalg
import torch
from torch import Tensor

from keeptune.core.errors import StatisticsError, need_finite

_log = logging.getLogger(__name__)
_RESOLVED = 1e-7
_Triplets = tuple[Tensor, Tensor, Tensor]


def canonical_signs(U: Tensor) -> Tensor:
    """Returns U ``(n, r)`` with columns negated so that the largest entry of each is positive, contiguous."""
    largest = U.gather(0, U.abs().argmax(dim=0, keepdim=True))
    return (U * torch.where(largest < 0, -1.0, 1.0).to(U.dtype)).contiguous()


def _signed(U: Tensor, S: Tensor, Vh: Tensor) -> _Triplets:
    """Make the largest entry of each u_i positive; ``U diag(S) Vᵀ`` stays what it is."""
    signed = canonical_signs(U)
    flipped = (signed * U).sum(0) < 0
    return signed, S, torch.where(flipped[:, None], -Vh, Vh).contiguous()


def bottom_eigenvectors(C: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Returns the r smallest eigenvalues of a symmetric C ``(n, n)``, ``(r,)``, and their eigenvectors, ``(n, r)``.

    In float64, because rounding in float32 hides everything below 1e-7 of the largest eigenvalue, and with
    it the null space. On the CPU only the r wanted vectors are computed (LAPACK's dsyevr). Only the lower triangle of C
    is read.

    Laws: ``C U == U diag(values)``; ``UᵀU == I``; values ascend and are the smallest there are.

    Raises:
        ValueError: r is not 1 to n.
    """
    n = C.shape[0]
    if not 1 <= r <= n:
        raise ValueError(f"bottom_eigenvectors: got r = {r}, wanted 1 <= r <= {n}")
    if C.device.type != "cpu":
        values, U = torch.linalg.eigh(C.double())
        return values[:r], canonical_signs(U[:, :r])
    # A column-major copy that LAPACK may overwrite saves two copies of an n x n matrix.
    matrix = C.to(torch.float64, copy=True).T.numpy()
    values, vectors = scipy.linalg.eigh(
        matrix, lower=False, subset_by_index=(0, r - 1), driver="evr", overwrite_a=True, check_finite=False
    )
    return torch.from_numpy(values), canonical_signs(torch.from_numpy(vectors))


def exact_svd(W: Tensor, where: str) -> _Triplets:
    """Returns ``U (m, k)``, ``S (k,)`` descending and ``Vᵀ (k, n)``, k = min(m, n), in W's dtype, float32 or float64.

    LAPACK's divide and conquer can fail to converge; then float64 is tried, then LAPACK's slower solver, and the log
    says so.
    Laws: ``U diag(S) Vᵀ == W``; ``UᵀU == V Vᵀ == I``; S descends; the largest entry of each ``u_i`` is positive.

    Raises:
        StatisticsError: W is NaN or infinite somewhere; ``where`` names its module.
    """
    need_finite(W.isfinite(), where, "numbers in its weight", StatisticsError)
    U, S, Vh = _signed(*_patient_svd(W, where))
    return U.to(W.dtype), S.to(W.dtype), Vh.to(W.dtype)


def projected_svd(W: Tensor, U: Tensor) -> _Triplets:
    """Returns the SVD of ``W U Uᵀ``: ``P (m, k)``, ``S (k,)`` descending, ``Vᵀ (k, n)``, k = min(m, r), in U's dtype.

    With the thin SVD ``W U = P S Rᵀ`` of orthonormal U ``(n, r)``, ``W U Uᵀ = P S (U R)ᵀ``: cost m n r + m r².
    Laws: ``P diag(S) Vᵀ == W U Uᵀ``; ``PᵀP == VᵀV == I`` where S > 0; the rows of Vᵀ lie in span(U).
    """
    P, S, Rh = _patient_svd(W.to(U.dtype) @ U, "projected weight")
    return P.to(U.dtype), S.to(U.dtype), Rh.to(U.dtype) @ U.T


def _patient_svd(W: Tensor, where: str) -> _Triplets:
    for dtype in (W.dtype, torch.float64):
        try:
            U, S, Vh = torch.linalg.svd(W.to(dtype), full_matrices=False)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            _log.warning("%s: the SVD did not converge in %s", where, str(dtype).removeprefix("torch."))
        else:
            return U, S, Vh
    _log.warning("%s: taking LAPACK's slower solver instead", where)
    parts = scipy.linalg.svd(W.double().cpu().numpy(), full_matrices=False, lapack_driver="gesvd")
    U, S, Vh = (torch.from_numpy(part).to(W.device) for part in parts)
    return U, S, Vh


def end_triplets(M: Tensor, r: int, end: Literal["top", "bottom"], where: str) -> _Triplets:
    """Returns the r largest or smallest singular triplets: ``U (m, r)``, ``S (r,)``, ``Vᵀ (r, n)``, float64.

    From r eigenvectors of the smaller Gram matrix in float64 and the thin SVD of M projected on them: several
    times faster than a full SVD, and a smaller error than that of a float32 one, whose smallest triplets are off by
    1e-7 of the largest singular value. Below that, where the Gram matrix ends, a full SVD in float64 is taken.

    Laws: ``M V == U diag(S)``, ``Mᵀ U == V diag(S)``; ``UᵀU == VᵀV == I``; S descends and lists the largest
    (smallest) of the min(m, n) singular values; the top triplets of rank min(m, n) make M; the largest entry of each
    ``u_i`` is positive.

    Raises:
        StatisticsError: M is not finite; ``where`` names its module.
        ValueError: r is not 1 to min(m, n).
    """
    if M.shape[0] < M.shape[1]:
        V, S, Uh = _end_of_tall(M.T, r, end, where)
        return _signed(Uh.T, S, V.T)
    return _signed(*_end_of_tall(M, r, end, where))


def _end_of_tall(M: Tensor, r: int, end: Literal["top", "bottom"], where: str) -> _Triplets:
    M = M.double()
    gram = M.T @ M
    need_finite(gram.diagonal().isfinite(), where, "entries", StatisticsError)
    U, S, Vh = projected_svd(M, bottom_eigenvectors(-gram if end == "top" else gram, r)[1])
    if bool(S[-1] <= _RESOLVED * gram.trace().sqrt()):
        # The left vectors of zeros cannot be had from M V = 0.
        U, S, Vh = exact_svd(M, where)
        keep = slice(0, r) if end == "top" else slice(len(S) - r, None)
        return U[:, keep], S[keep], Vh[keep]
    return U, S, Vh


def top_energy(W: Tensor, k: int) -> float:
    """Returns the share of the energy of ``W`` in its k largest singular values (FARSS Fig. 1); NaN for zeros.

    ``E_k(W) = (s₁² + ... + s_k²) / (s₁² + s₂² + ...)``, from the eigenvalues s² of the smaller of ``W Wᵀ`` and
    ``Wᵀ W``, in float64; k may be more than there are.
    Laws: ``0 < E_k <= 1``; E_k grows with k; ``E_k == 1`` from the rank of W on; ``E_k(c W) == E_k(W)``;
    ``E_k(Wᵀ) == E_k(W)``.

    Raises:
        ValueError: k is below 1.
    """
    if k < 1:
        raise ValueError(f"top_energy: got k = {k}, wanted at least 1")
    W = W.double()  # squares of float32 numbers stay in its range
    if not W.any():
        return math.nan
    small = W if W.shape[0] <= W.shape[1] else W.T
    squares = torch.linalg.eigvalsh(small @ small.T).clamp_min(0)  # ascending
    return float(squares[-k:].sum() / squares.sum())
