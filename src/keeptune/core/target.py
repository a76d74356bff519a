"""Target: one linear map y = W x + b of a model, and how to read its weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["Target", "read_weight"]


@dataclass(frozen=True, slots=True)
class Target:
    """One linear map ``y = W x + b`` of the model, with ``W`` of shape ``(out_features, in_features)``.

    Args:
        name: The module's path, ``"model.layers.7.mlp.down_proj"``.
        layer: Index of its block; -1 outside any block.
        role: What it does in its block; equal over blocks. Methods match roles, never pieces of names.
        out_features: m.
        in_features: n.
        input_group: Equal for targets fed by the same tensor (q/k/v; gate/up): they share one covariance.
        transposed: The module stores ``W`` as ``(in_features, out_features)``, as GPT-2's Conv1D does.
        bias: There is a b.
    """

    name: str
    layer: int
    role: str
    out_features: int
    in_features: int
    input_group: str
    transposed: bool = False
    bias: bool = False

    @property
    def max_rank(self) -> int:
        """The largest rank a change of this target can have."""
        return min(self.out_features, self.in_features)


def read_weight(model: nn.Module, target: Target) -> Tensor:
    """Returns a copy of ``W``, ``(out_features, in_features)``, float32, on the weight's device."""
    weight = model.get_submodule(target.name).weight
    assert isinstance(weight, Tensor)
    matrix = weight.detach().T if target.transposed else weight.detach()
    return matrix.to(torch.float32, copy=True).contiguous()
