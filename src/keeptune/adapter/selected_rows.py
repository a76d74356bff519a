"""Changes confined to some rows of W, and to the same of b, in stock LoRA layers (LoKI).

    y = W x + b + s (B A x + c)        B and c zero outside the rows

B may be trained or not, c is PEFT's ``lora_bias``. Outside the rows nothing may move: their outputs are replaced by
zeros, so that their gradients are exactly zero, and so are the steps of any optimiser, with weight decay or momentum.
A hook on the output holds where one on a parameter would not: through FSDP2, which replaces parameters, and through a
copy of the model. What is added to gradients besides has to be confined too (:func:`within_rows`).
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils.warning import PeftWarning
from torch import Tensor, nn

from keeptune.core.plan import TargetPlan
from keeptune.core.trained_tensors import TensorName

__all__ = ["add_bias", "biases_are_no_shards", "confine", "within_rows"]

_BUFFER = "frozen_rows"
_BIASES = r"Adapter '\w+': \d+ LoRA tensor\(s\) have invalid shape: (\S+\.lora_B\.bias:\([1-9]\d*,\)(, )?)+( \(\+|\.)"


def add_bias(layer: Any, bias: Tensor) -> None:
    """Give a LoRA layer a trained bias, as PEFT's ``lora_bias`` does, but at this layer only.

    Args:
        layer: The PEFT layer, with the adapter ``"default"``.
        bias: c at the first step ``(m,)``.
    """
    up = layer.lora_B["default"]
    up.bias = nn.Parameter(bias.to(up.weight.device, up.weight.dtype, copy=True))
    layer.lora_bias["default"] = True
    # PEFT freezes modules, and the bias is trained where B is not: what this tuple names can be frozen by itself.
    layer.lora_B_weight = _Weights(layer.lora_B)
    layer.adapter_layer_names = (*layer.adapter_layer_names, "lora_B_weight")


def confine(layer: Any, target_plan: TargetPlan) -> None:
    """Keep B and the bias of a LoRA layer as they are outside a plan's rows.

    Args:
        layer: The PEFT layer, with the adapter ``"default"``.
        target_plan: The target's plan.
    """
    if target_plan.confined:
        up = layer.lora_B["default"]
        up.register_buffer(_BUFFER, _outside(target_plan, up.weight.device), persistent=False)
        up.register_forward_hook(_zero_frozen_rows)


def within_rows(target_plan: TargetPlan, factor: TensorName, gradient: Tensor) -> Tensor:
    """Drop the part of a gradient that is outside a plan's rows.

    Law: zero outside the rows, the same inside; every gradient of a plan without rows is left as it is.

    Args:
        target_plan: The target's plan.
        factor: Whose gradient.
        gradient: ``(m, ...)`` for B and the bias.

    Returns:
        The gradient to use.
    """
    if factor not in target_plan.confined:
        return gradient
    outside = _outside(target_plan, gradient.device)
    return gradient.masked_fill(outside if gradient.ndim == 1 else outside[:, None], 0)


@contextmanager
def biases_are_no_shards() -> Iterator[None]:
    """Leave out a warning of PEFT's, which takes a trained bias for a shard of a weight whenever it is saved."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_BIASES, category=PeftWarning)
        yield


def _outside(target_plan: TargetPlan, device: torch.device) -> Tensor:
    outside = torch.ones(target_plan.target.out_features, dtype=torch.bool)
    outside[list(target_plan.decision.rows or ())] = False
    return outside.to(device)


def _zero_frozen_rows(module: nn.Module, _: Any, output: Tensor) -> Tensor:
    outside = module.get_buffer(_BUFFER)
    return output.masked_fill(outside, 0)


class _Weights(Mapping[str, Any]):
    """The weights of adapters, without their biases, as they are now: sharding replaces parameters.

    Args:
        modules: Adapter name to module.
    """

    def __init__(self, modules: nn.ModuleDict) -> None:
        self._modules = modules

    def __getitem__(self, name: str) -> Any:
        return self._modules[name].weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)
