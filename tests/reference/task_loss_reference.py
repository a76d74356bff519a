"""Losses of a task's tokens by their papers' equations, a token at a time in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def token_loss(name: str, logits: Tensor, base: Tensor, token: int) -> Tensor:
    """The loss of one token from the logits of the model and of the base where it is predicted, with its gradient."""
    p, p_base = logits.double().softmax(-1), base.double().softmax(-1)
    nll = -p[token].log()
    own = p[token].item()
    top = sorted(p.tolist(), reverse=True)[:20]
    q = torch.tensor(top, dtype=torch.float64) / sum(top)
    entropy = -float((q * q.log()).sum()) / float(torch.tensor(float(len(top)), dtype=torch.float64).log())
    kl = (p_base * (p_base.log() - p.log())).sum()
    return {"nll": nll, "dft": own * nll, "eaft": entropy * nll, "asft": own * nll + 0.1 * kl}[name]
