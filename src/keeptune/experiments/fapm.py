"""FAPM: prune a trained change where it is large against the weight that it changes.

Huang, Cheng and Wang, "Mitigating Catastrophic Forgetting in Large Language Models with Forgetting-aware Pruning",
EMNLP 2025, 2509.08255.

    S = |ΔW| - mean(|W|) |ΔW| / |W|          for each number of a tensor                               (1)
    ΔW' = ΔW where S is among the (1 - p) N largest of the tensor's N, else 0                          (2)

As in the authors' code: every tensor by itself, embeddings and norms too, p = 0.9. Our reading: S is -inf where only W
is 0, and 0 where nothing changed; of equals the first are pruned; p N is rounded to the nearest.
Laws: p = 0 changes nothing and p = 1 leaves W; what is pruned at one p is pruned at every larger one; neither the
signs nor the scales of W and of ΔW move it.
"""

import torch
from torch import Tensor


def forgetting(W: Tensor, change: Tensor) -> Tensor:
    """Returns S (eq. 1) of a change ``(...)`` of W: the smaller, the sooner a number is pruned."""
    ratio = torch.where(W == 0, torch.inf, W.abs().mean() / W.abs())
    return torch.where(change == 0, 0.0, change.abs() * (1 - ratio))


def kept(W: Tensor, change: Tensor, share: float) -> Tensor:
    """Returns which numbers of a change ``(...)`` stay where a share p is pruned (eq. 2), truth values."""
    order = forgetting(W, change).flatten().argsort(stable=True)
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return (rank >= round(share * len(order))).view_as(change)
