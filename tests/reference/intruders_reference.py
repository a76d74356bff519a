"""The reduction of intruder dimensions written out in loops, for one weight."""

from __future__ import annotations

import torch
from torch import Tensor


def without_intruders(W0: Tensor, change: Tensor, keep: float, rank: int, top: int = 10, bound: float = 0.5) -> Tensor:
    """Take the share 1 - keep of each intruder out of W0 + change, and cut what is left of the change to a rank."""
    U0 = torch.linalg.svd(W0.double(), full_matrices=False).U
    U, S, Vh = torch.linalg.svd((W0 + change).double(), full_matrices=False)
    reduced = (W0 + change).double()
    for i in range(min(top, len(S))):
        if max(float((U[:, i] @ U0[:, j]).abs()) for j in range(U0.shape[1])) < bound:
            reduced -= (1 - keep) * S[i] * torch.outer(U[:, i], Vh[i])
    left, values, right = torch.linalg.svd(reduced - W0.double(), full_matrices=False)
    return left[:, :rank] @ torch.diag(values[:rank]) @ right[:rank]
