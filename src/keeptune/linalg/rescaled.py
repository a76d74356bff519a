"""A low-rank change of a weight whose rows then get new lengths (DoRA)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from keeptune.core.low_rank import LowRank


@dataclass(frozen=True, slots=True, eq=False)
class Rescaled:
    """``W'_i - W_i`` with ``W'_i = c_i (W_i + d_i)``, ``d = B A`` and ``c_i = lengths_i / ||W_i + d_i||``, by rows i.

    W is ``(m, n)``, d the change with its scale. Law: ``norm()`` is the Frobenius norm of ``dense()``.
    """

    W: Tensor
    change: LowRank
    lengths: Tensor

    def norm(self) -> float:
        """Returns ``||W' - W||`` from ``(c_i - 1)² ||W_i||² + 2 c_i (c_i - 1) W_i·d_i + c_i² ||d_i||²``, in float64."""
        c, rows, crossed, own = self._parts()
        squares = (c - 1).square() * rows + 2 * c * (c - 1) * crossed + c.square() * own
        return float(squares.clamp_min(0).sum().sqrt())

    def dense(self) -> Tensor:
        """Returns the difference, ``(m, n)``, float64."""
        c, *_ = self._parts()
        return (c - 1)[:, None] * self.W.double() + c[:, None] * self.change.to(torch.float64).dense()

    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute c, ``||W_i||²``, ``W_i·d_i`` and ``||d_i||²``, each ``(m,)``."""
        W, B, A = self.W.double(), self.change.B.double(), self.change.A.double()
        rows = W.square().sum(1)
        crossed = ((W @ A.T) * B).sum(1)
        own = ((B @ (A @ A.T)) * B).sum(1)
        squares = (rows + 2 * crossed + own).clamp_min(torch.finfo(torch.float64).tiny)
        return self.lengths.double() / squares.sqrt(), rows, crossed, own
