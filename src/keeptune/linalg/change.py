"""How large a weight's change is, without forming it where it has few directions."""

from __future__ import annotations

import torch
from torch import Tensor

from keeptune.core.low_rank import LowRank

__all__ = ["change_norm", "rescaled_change_norm"]


def change_norm(W: Tensor, tuned: Tensor) -> float:
    """Measure the change between two dense weights, in float64.

    Law: ``change_norm(W, W + D) == ||D||`` (Frobenius).

    Args:
        W: ``(m, n)``, before.
        tuned: ``(m, n)``, after.

    Returns:
        ``||tuned - W||``.
    """
    return float((tuned.double() - W.double()).norm())


def rescaled_change_norm(W: Tensor, change: LowRank, lengths: Tensor) -> float:
    """Measure the change where rows are given new lengths after a low-rank change (DoRA), without the product B A.

    ``W'_i = c_i (W_i + d_i)`` with ``c_i = lengths_i / ||W_i + d_i||`` and ``d = B A``, so that
    ``||W'_i - W_i||² = (c_i - 1)² ||W_i||² + 2 c_i (c_i - 1) W_i·d_i + c_i² ||d_i||²``.
    Laws: equal to the norm of the dense difference; with lengths ``||W_i + d_i||`` it is ``||d||``.

    Args:
        W: ``(m, n)``, before.
        change: ``d``, with its scale, ``(m, n)`` as factors.
        lengths: ``(m,)``, of the rows after training.

    Returns:
        ``||W' - W||``.
    """
    W, B, A, lengths = W.double(), change.B.double(), change.A.double(), lengths.double()
    rows = W.square().sum(1)
    crossed = ((W @ A.T) * B).sum(1)
    own = ((B @ (A @ A.T)) * B).sum(1)
    c = lengths / (rows + 2 * crossed + own).clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    squares = (c - 1).square() * rows + 2 * c * (c - 1) * crossed + c.square() * own
    return float(squares.clamp_min(0).sum().sqrt())
