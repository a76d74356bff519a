"""KaSA's diagonal on a stock LoRA layer, with PEFT's own forward and without PEFT's rewriting of the base weight.

PEFT's KaSA, asked for by config, decomposes every weight again, overwrites it for good, and refuses layers that
store W transposed. The plan has the decomposition already, and what it drops is taken out as any anchor is.
"""

from __future__ import annotations

from typing import Any

from peft.tuners.lora.variants import KasaLinearVariant
from torch import Tensor, nn

__all__ = ["add_diagonal"]


def add_diagonal(layer: Any, diag: Tensor) -> None:
    """Make a LoRA layer compute ``s B diag(d) A x`` and train d.

    Args:
        layer: The PEFT layer, with the adapter ``"default"``.
        diag: d at the first step ``(r,)``.
    """
    weight = layer.lora_A["default"].weight
    layer.lora_diag = nn.ParameterDict({"default": nn.Parameter(diag.to(weight.device, weight.dtype, copy=True))})
    # PEFT saves, freezes and moves what this tuple names.
    layer.adapter_layer_names = (*layer.adapter_layer_names, "lora_diag")
    layer.lora_variant["default"] = KasaLinearVariant()
