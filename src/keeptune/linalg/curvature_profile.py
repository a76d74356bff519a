"""The energy of a weight change along the eigenvectors of a curvature."""

from dataclasses import dataclass

import torch
from torch import Tensor

from keeptune.core.low_rank import LowRank


@dataclass(frozen=True, slots=True, eq=False)
class Directions:
    """The eigenvectors of F, ``(n, n)``, from the largest eigenvalue on.

    Args:
        U: ``(n, n)``, orthonormal columns.
        values: ``(n,)`` eigenvalues, not negative.
    """

    U: Tensor
    values: Tensor


def directions(F: Tensor) -> Directions:
    """Returns the eigenvectors of a symmetric positive semi-definite matrix in float64.

    Laws: ``values.sum() == F.trace()``; ``values == diag(Uᵀ F U)``, falling.
    """
    values, U = torch.linalg.eigh(F.double())
    return Directions(U.flip(1), values.flip(0).clamp_min(0))


def energies(change: LowRank | Tensor, along: Directions) -> Tensor:
    """Returns the energy of a change E, ``(m, n)``, along each direction, ``||E u_i||²``, ``(n,)``, float64.

    Law: they sum to ``||E||²``.
    """
    U = along.U
    if isinstance(change, LowRank):
        factors = change.to(torch.float64, U.device)
        C = factors.A @ U
        return (C * ((factors.B.T @ factors.B) @ C)).sum(0).clamp_min(0)
    return (change.to(U) @ U).square().sum(0)


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
