"""Anchors: how the part of W that an adapter starts from is taken out of W.

    y = W x + s (B A - B0 A0) x

``residual`` writes ``W - s B0 A0`` into memory, as the papers do: no extra work, but rounding noise on a
16-bit base, and ``disable_adapter()`` leaves the residual, not the base. ``twin`` leaves W alone and adds a
second, frozen adapter ``-B0 A0``: exact on any base, ``disable_adapter()`` restores the base, at the cost
of one more rank-r product.
"""

from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from keeptune.adapter.expert_layers import held_in
from keeptune.core.errors import PlanError
from keeptune.core.plan import Plan, TargetPlan
from keeptune.core.weights import is_quantised

Anchor = Literal["auto", "twin", "residual"]
ANCHOR_NAME = "anchor"
_STARTED = {"default", "ref"}  # adapters with the plan's start: ours, and TRL's frozen copy of it


def resolve(anchor: Anchor, dtype: torch.dtype, *, quantised: bool = False) -> Literal["twin", "residual"]:
    """Returns the anchor itself, or for ``auto`` residual where it is exact enough (float32) and twin elsewhere.

    Raises:
        PlanError: A residual of a quantised base, which would have to be quantised again.
    """
    if anchor == "residual" and quantised:
        raise PlanError(
            "anchor",
            got="residual on a quantised base",
            wanted="twin: W less a part of it would have to be quantised again, which moves all of W",
            next_step="Leave `anchor` out.",
        )
    if anchor != "auto":
        return anchor
    return "residual" if dtype == torch.float32 and not quantised else "twin"


def apply_anchor(layer: Any, target_plan: TargetPlan, kind: Literal["twin", "residual"]) -> None:
    """Takes a target's start out of what its PEFT layer computes."""
    with torch.no_grad():
        if kind == "twin":
            start = target_plan.init
            for factor, value in (("A", start.A), ("B", -start.B)):
                held = held_in(layer, target_plan, factor, ANCHOR_NAME)
                held.of(held.parameter).copy_(value)
        else:
            target = target_plan.target
            weight = target.stored(layer.get_base_layer().get_parameter(target.parameter.rpartition(".")[2]))
            weight.copy_(subtract(weight.detach(), target_plan))


def _start(weight: Tensor, target_plan: TargetPlan) -> Tensor:
    """Computes ``s B0 A0`` in float32, in the layout of a module's weight."""
    start = target_plan.init.to(torch.float32, weight.device).scaled(target_plan.scale).dense()
    return start.T if target_plan.target.transposed else start


def subtract(weight: Tensor, target_plan: TargetPlan) -> Tensor:
    """Returns the residual ``W - s B0 A0`` of a stored weight, formed in float32, rounded to the weight's dtype."""
    return (weight.float() - _start(weight, target_plan)).to(weight.dtype)


def start_errors(model: PreTrainedModel, plan: Plan, *, anchor: Anchor = "auto") -> dict[str, float]:
    """Returns how far each target's weight is from W at the start of training, in the base's dtype.

    ``‖W_res + s B0 A0 - W‖ / ‖W‖`` (Frobenius) by name, where ``B0 A0`` is what was taken out; 0 for a twin, which
    leaves W as it is.
    """
    errors, kind = {}, resolve(anchor, model.dtype, quantised=is_quantised(model))
    for target_plan in plan.targets:
        name = target_plan.target.name
        errors[name] = 0.0
        if target_plan.anchored and kind == "residual":
            target = target_plan.target
            weight = target.stored(model.get_parameter(target.parameter)).detach()
            gap = subtract(weight, target_plan).float() + _start(weight, target_plan) - weight.float()
            errors[name] = float(gap.norm() / weight.float().norm())
    return errors


def keep_active(model: PeftModel) -> None:
    """Keeps the twin active whatever is called between here and a forward pass.

    ``Trainer`` activates one adapter only when it resumes from a checkpoint, and TRL's DPO, KTO, GRPO and RLOO
    activate only the copy of the start that they compare with; both would drop the anchor without a word. A hook
    puts it back before every forward pass, of the model inside too, which ``generate`` calls.
    """

    def activate(module: nn.Module, *_: Any) -> None:
        active = model.base_model.active_adapters
        if ANCHOR_NAME not in active and _STARTED.intersection(active):
            model.base_model.set_adapter([*active, ANCHOR_NAME])

    model.get_base_model().register_forward_pre_hook(activate)
    activate(model)
