"""Anchors: how the part of W that an adapter starts from is taken out of W.

    y = W x + s (B A - B0 A0) x

``residual`` writes ``W - s B0 A0`` into memory, as the papers do: no extra work, but rounding noise on a
16-bit base, and ``disable_adapter()`` leaves the residual, not the base. ``twin`` leaves W alone and adds a
second, frozen adapter ``-B0 A0``: exact on any base, ``disable_adapter()`` gives the base back, at the cost
of one more rank-r product.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn

from keeptune.core.plan import TargetPlan

__all__ = ["ANCHOR_NAME", "Anchor", "add_twin", "keep_active", "resolve", "subtract", "write_residual"]

Anchor = Literal["auto", "twin", "residual"]
ANCHOR_NAME = "anchor"
_STARTED = {"default", "ref"}  # adapters with the plan's start: ours, and TRL's frozen copy of it


def resolve(anchor: Anchor, dtype: torch.dtype) -> Literal["twin", "residual"]:
    """Choose for ``auto``: residual where it is exact enough (float32), twin elsewhere.

    Args:
        anchor: What was asked for.
        dtype: The base model's dtype.

    Returns:
        ``"twin"`` or ``"residual"``.
    """
    if anchor != "auto":
        return anchor
    return "residual" if dtype == torch.float32 else "twin"


def subtract(weight: Tensor, target_plan: TargetPlan) -> Tensor:
    """Take the start out of a weight: ``W - s B0 A0``, formed in float32, rounded to the weight's dtype.

    Args:
        weight: As the module stores it.
        target_plan: The target's plan.

    Returns:
        The residual, shaped like ``weight``.
    """
    start = target_plan.anchor.to(torch.float32, weight.device).scaled(target_plan.scale).dense()
    start = start.T if target_plan.target.transposed else start
    return (weight.float() - start).to(weight.dtype)


def write_residual(layer: Any, target_plan: TargetPlan) -> None:
    """Write the residual into the base weight of a PEFT layer.

    Args:
        layer: The PEFT LoRA layer.
        target_plan: The target's plan.
    """
    weight = layer.get_base_layer().weight
    with torch.no_grad():
        weight.copy_(subtract(weight.detach(), target_plan))


def add_twin(layer: Any, target_plan: TargetPlan) -> None:
    """Fill the frozen twin of a PEFT layer with ``-B0 A0``.

    Args:
        layer: The PEFT LoRA layer; it already has an adapter of the name :data:`ANCHOR_NAME`.
        target_plan: The target's plan.
    """
    with torch.no_grad():
        layer.lora_A[ANCHOR_NAME].weight.copy_(target_plan.anchor.A)
        layer.lora_B[ANCHOR_NAME].weight.copy_(-target_plan.anchor.B)


def keep_active(model: PeftModel) -> None:
    """Keep the twin active whatever is called between here and a forward pass.

    ``Trainer`` activates one adapter only when it resumes from a checkpoint, and TRL's DPO, KTO, GRPO and RLOO
    activate only the copy of the start that they compare with; both would drop the anchor without a word. A hook
    puts it back before every forward pass, of the model inside too, which ``generate`` calls.

    Args:
        model: A model with a twin.
    """

    def activate(module: nn.Module, *_: Any) -> None:
        active = model.base_model.active_adapters
        if ANCHOR_NAME not in active and _STARTED.intersection(active):
            model.base_model.set_adapter([*active, ANCHOR_NAME])

    model.get_base_model().register_forward_pre_hook(activate)
    activate(model)
