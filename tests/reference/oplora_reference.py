"""OPLoRA as its paper writes it: both factors are free, and the forward pass projects them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn.utils import parametrize

from keeptune.adapter.install import lora_layer


class _Off(nn.Module):
    def __init__(self, Q: Tensor, left: bool) -> None:
        super().__init__()
        self.register_buffer("P", (torch.eye(len(Q)) - Q @ Q.T).float())
        self.left = left

    def forward(self, free: Tensor) -> Tensor:
        return self.P @ free if self.left else free @ self.P


def top(W: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """``U_k``, ``S_k`` and ``V_k`` of a whole SVD, float64."""
    U, S, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    return U[:, :k], S[:k], Vh[:k].T


def project_in_forward(model: PeftModel, names: Iterable[str], k: int) -> None:
    """Has the layers of a plain LoRA compute ``P_L B A P_R x``."""
    for name in names:
        layer = lora_layer(model, name)
        U, _, V = top(layer.get_base_layer().weight.detach(), k)
        parametrize.register_parametrization(layer.lora_B["default"], "weight", _Off(U, left=True))
        parametrize.register_parametrization(layer.lora_A["default"], "weight", _Off(V, left=False))
