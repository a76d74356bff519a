"""Slow, obvious statistics: one example at a time, no padding, no batches, float64."""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import PreTrainedModel

from keeptune.data.calibration import Calibration


def stacked_inputs(model: PreTrainedModel, module: str, data: Calibration) -> Tensor:
    """X as the paper has it: ``(n, N)``, a column per token of every example, float64 (LoRA-Null section 3)."""
    exact = copy.deepcopy(model).double().eval()
    columns: list[Tensor] = []
    handle = exact.get_submodule(module).register_forward_pre_hook(lambda _, inputs: columns.extend(inputs[0][0]))
    with torch.no_grad():
        for sequence in data.sequences:
            exact(input_ids=torch.tensor([sequence]))
    handle.remove()
    return torch.stack(columns, dim=1)


def covariance(model: PreTrainedModel, module: str, data: Calibration) -> Tensor:
    """``Ω = (1/N) Σ h hᵀ``, token by token."""
    X = stacked_inputs(model, module, data)
    total = torch.zeros(X.shape[0], X.shape[0], dtype=torch.float64)
    for h in X.T:
        total += torch.outer(h, h)
    return total / X.shape[1]
