"""The energy of a weight change along the eigenvectors of a curvature."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from keeptune.core.low_rank import LowRank
from keeptune.linalg.symmetric import Dense, LowRankDiagonal, PsdMatrix


@dataclass(frozen=True, slots=True, eq=False)
class Directions:
    """The eigenvectors of F, ``(n, n)``, from the largest eigenvalue on; the last may stand for many of one eigenvalue.

    Args:
        U: ``(n, k)``, orthonormal columns.
        values: ``(k,)`` eigenvalues, or ``(k + 1,)`` where the last is that of all directions outside U.
        counts: How many directions each eigenvalue stands for; they sum to n.
    """

    U: Tensor
    values: Tensor
    counts: Tensor


def directions(factor: PsdMatrix) -> Directions | None:
    """Returns the eigenvectors of a matrix in float64; None for a multiple of the identity, which has no own ones.

    Of low rank plus a diagonal they are the Ritz vectors of F within U, and what is outside has its mean.
    Laws: ``counts.sum() == n``; ``(values * counts).sum() == F.trace()``; ``values == diag(Uᵀ F U)``, falling.
    """
    if isinstance(factor, Dense):
        values, U = torch.linalg.eigh(factor.matrix.double())
        return Directions(U.flip(1), values.flip(0).clamp_min(0), torch.ones_like(values))
    if not isinstance(factor, LowRankDiagonal):
        return None
    F = factor.to(torch.float64)
    basis = torch.linalg.qr(F.U)[0]
    values, Q = torch.linalg.eigh(basis.T @ F.apply(basis))
    values, rest = values.flip(0), F.size - F.rank
    counts = torch.ones_like(values)
    if rest:
        values = torch.cat([values, ((F.trace() - values.sum()).clamp_min(0) / rest).reshape(1)])
        counts = torch.cat([counts, counts.new_tensor([float(rest)])])
    return Directions(basis @ Q.flip(1), values, counts)


def energies(change: LowRank | Tensor, along: Directions) -> Tensor:
    """Returns the energy of a change E, ``(m, n)``, along each direction, ``||E u_i||²``, one per eigenvalue, float64.

    Laws: they sum to ``||E||²``; of the whole complement of U it is what is left.
    """
    U = along.U
    if isinstance(change, LowRank):
        factors = change.to(torch.float64, U.device)
        C = factors.A @ U
        energy, total = (C * ((factors.B.T @ factors.B) @ C)).sum(0), factors.norm_squared()
    else:
        E = change.to(U)
        energy, total = (E @ U).square().sum(0), E.square().sum()
    energy = energy.clamp_min(0)
    if len(along.values) > len(energy):
        energy = torch.cat([energy, (total - energy.sum()).clamp_min(0).reshape(1)])
    return energy


def profile(widths: Tensor, energy: Tensor, bins: int = 10) -> Tensor:
    """Returns the share of an energy in each of several equal parts of a quantity that directions hold, float64.

    Directions lie side by side in their order, each as wide as what it holds (its eigenvalue, or 1 to count them), its
    energy spread evenly over its width; the whole is cut into equal parts. Energy of a direction without width counts
    for the part that it lies in. Widths and energies, ``(k,)`` each, are not negative, and some energy is not zero.
    Laws: the shares sum to 1; energy in proportion to the widths gives equal shares; so does ``bins=1``.
    """
    widths, energy = widths.double(), energy.double()
    total = widths.sum()
    if not total > 0:
        return torch.nn.functional.one_hot(torch.tensor(bins - 1, device=energy.device), bins).to(energy)
    ends = widths.cumsum(0) / total * bins
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    edges = torch.arange(bins, dtype=ends.dtype, device=ends.device)
    inside = (torch.minimum(ends[:, None], edges + 1) - torch.maximum(starts[:, None], edges)).clamp_min(0)
    covered = inside.sum(1, keepdim=True)
    point = torch.nn.functional.one_hot(ends.long().clamp(0, bins - 1), bins).to(inside)
    shares = torch.where(covered > 1e-12, inside / covered.clamp_min(1e-300), point)
    return (energy[:, None] * shares).sum(0) / energy.sum()
