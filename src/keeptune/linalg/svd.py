"""Singular value decompositions that never form the large matrix they decompose."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from keeptune.core.errors import StatisticsError
from keeptune.linalg.eigen import canonical_signs

__all__ = ["exact_svd", "projected_svd", "signed_triplets"]

_log = logging.getLogger(__name__)


def exact_svd(W: Tensor, where: str) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose ``W = U diag(S) Vᵀ``, with signs that do not depend on the solver.

    LAPACK's divide and conquer can fail to converge; then float64 is tried, then the Gram matrix of the shorter
    side (which resolves singular values down to 1e-8 of the largest), and the log says so.
    Laws: ``U diag(S) Vᵀ == W``; ``UᵀU == V Vᵀ == I``; S descends; the largest entry of each ``u_i`` is positive.

    Args:
        W: ``(m, n)``, float32 or float64.
        where: The module's name, for messages.

    Returns:
        ``U (m, k)``, ``S (k,)`` descending, ``Vᵀ (k, n)`` with k = min(m, n), in W's dtype.

    Raises:
        StatisticsError: W is NaN or infinite somewhere.
    """
    if not bool(torch.isfinite(W).all()):
        raise StatisticsError(
            where,
            got="NaN or infinite numbers in its weight",
            wanted="finite ones",
            next_step="Get the model's files again, or load it in the dtype it was saved in.",
        )
    U, S, Vh = signed_triplets(*_patient_svd(W, where))
    return U.to(W.dtype), S.to(W.dtype), Vh.to(W.dtype)


def signed_triplets(U: Tensor, S: Tensor, Vh: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Give singular triplets signs that do not depend on the solver.

    Laws: ``U diag(S) Vᵀ`` is what it was; the largest entry of each ``u_i`` is positive.

    Args:
        U: ``(m, r)``.
        S: ``(r,)``.
        Vh: ``(r, n)``.

    Returns:
        The triplets, some of them negated on both sides.
    """
    signed = canonical_signs(U)
    flipped = (signed * U).sum(0) < 0
    return signed, S, torch.where(flipped[:, None], -Vh, Vh).contiguous()


def _patient_svd(W: Tensor, where: str) -> tuple[Tensor, Tensor, Tensor]:
    for dtype in (W.dtype, torch.float64):
        try:
            U, S, Vh = torch.linalg.svd(W.to(dtype), full_matrices=False)
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            _log.warning("%s: the SVD did not converge in %s", where, str(dtype).removeprefix("torch."))
        else:
            return U, S, Vh
    _log.warning("%s: taking the eigenvectors of its Gram matrix instead", where)
    W = W.double()
    return _gram_svd(W) if W.shape[0] <= W.shape[1] else _transposed(_gram_svd(W.T))


def _gram_svd(W: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose a wide matrix by ``W Wᵀ = U S² Uᵀ``; QR makes V orthonormal where S is zero."""
    U = torch.linalg.eigh(W @ W.T)[1].flip(1)
    Q, R = torch.linalg.qr(W.T @ U)
    signs = torch.where(R.diagonal() < 0, -1.0, 1.0).to(R.dtype)
    S, order = R.diagonal().abs().sort(descending=True, stable=True)
    return U[:, order], S, (Q * signs)[:, order].T


def _transposed(parts: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    U, S, Vh = parts
    return Vh.T, S, U.T


def projected_svd(W: Tensor, U: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Decompose ``W U Uᵀ`` from the thin SVD of ``W U``.

    With ``W U = P S Rᵀ`` (m x r), ``W U Uᵀ = P S (U R)ᵀ``: cost m n r + m r² instead of m n².
    Laws: ``P diag(S) Vᵀ == W U Uᵀ``; ``PᵀP == VᵀV == I`` where S > 0; the rows of Vᵀ lie in span(U).

    Args:
        W: ``(m, n)``.
        U: ``(n, r)``, orthonormal columns.

    Returns:
        ``P (m, k)``, ``S (k,)`` descending, ``Vᵀ (k, n)`` with k = min(m, r), in the dtype of U.
    """
    P, S, Rh = _patient_svd(W.to(U.dtype) @ U, "projected weight")
    return P.to(U.dtype), S.to(U.dtype), Rh.to(U.dtype) @ U.T
