"""Stock PEFT layers that hold other than A and B: a bias, and rows that do not move.

    y = W x + b + s (B A x + c)        LoKI: B and c are zero outside the plan's rows

B may be trained or not, c is PEFT's ``lora_bias``. Outside the rows nothing may move: their outputs are replaced by
zeros, so that their gradients are exactly zero, and so are the steps of any optimiser, with weight decay or momentum.
A hook on the output holds where one on a parameter would not: through FSDP2, which replaces parameters, and through a
copy of the model. What is added to gradients besides has to be confined too (:func:`within_rows`).
"""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.utils.warning import PeftWarning
from torch import Tensor, nn

from keeptune.core.plan import TargetPlan
from keeptune.core.target import TensorName

_BUFFER = "frozen_rows"
_BIASES = r"Adapter '\w+': \d+ LoRA tensor\(s\) have invalid shape: (\S+\.lora_B\.bias:\([1-9]\d*,\)(, )?)+( \(\+|\.)"


def prepare(layer: Any, target_plan: TargetPlan) -> None:
    """Adds to a LoRA layer what its plan trains besides A and B, and confines it to the plan's rows."""
    up = layer.lora_B["default"]
    if "bias" in target_plan.vectors:
        up.bias = nn.Parameter(target_plan.vectors["bias"].to(up.weight.device, up.weight.dtype, copy=True))
        layer.lora_bias["default"] = True
        # PEFT freezes modules, and the bias is trained where B is not: these weights can be frozen by themselves.
        layer.lora_B_weight = _Weights(layer.lora_B)
        layer.adapter_layer_names = (*layer.adapter_layer_names, "lora_B_weight")
    if target_plan.confined:
        up.register_buffer(_BUFFER, _outside(target_plan, up.weight.device), persistent=False)
        up.register_forward_hook(lambda own, _, output: output.masked_fill(own.get_buffer(_BUFFER), 0))


def within_rows(target_plan: TargetPlan, name: TensorName, gradient: Tensor) -> Tensor:
    """Returns the gradient ``(m, ...)`` of B or a bias without the part outside a plan's rows.

    Law: zero outside the rows, the same inside; every gradient of a plan without rows is left as it is.
    """
    if name not in target_plan.confined:
        return gradient
    outside = _outside(target_plan, gradient.device)
    return gradient.masked_fill(outside if gradient.ndim == 1 else outside[:, None], 0)


@contextmanager
def biases_are_no_shards() -> Iterator[None]:
    """Leaves out a warning of PEFT's, which takes a trained bias for a shard of a weight whenever it is saved."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_BIASES, category=PeftWarning)
        yield


def _outside(target_plan: TargetPlan, device: torch.device) -> Tensor:
    outside = torch.ones(target_plan.target.out_features, dtype=torch.bool)
    outside[list(target_plan.decision.rows or ())] = False
    return outside.to(device)


class _Weights(Mapping[str, Any]):
    """The weights of adapters, without their biases, as they are now: sharding replaces parameters."""

    def __init__(self, modules: nn.ModuleDict) -> None:
        self._modules = modules

    def __getitem__(self, name: str) -> Any:
        return self._modules[name].weight

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)
