"""OSF: weights trained but for their top singular directions, in stock PEFT layers."""

from __future__ import annotations

import re
from typing import Any

import torch
from peft import OSFConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from keeptune.adapter.trained_head import head_names, keep_precise, task_type
from keeptune.core.plan import Plan

__all__ = ["install_subspace", "subspace_change"]


def install_subspace(model: PreTrainedModel, plan: Plan) -> PeftModel:
    """Wraps the targets in PEFT's OSF layers; each target's rank in the plan is that of its trained part.

    The model is changed in place, its weights are not: it computes what it did before, to rounding.
    """
    frozen = {f"^{re.escape(t.target.name)}$": t.target.max_rank - t.decision.rank for t in plan.targets}
    config = OSFConfig(
        task_type=task_type(plan),
        target_modules=[t.target.name for t in plan.targets],
        rank_pattern=frozen,
        modules_to_save=list(head_names(plan)) or None,
    )
    for target_plan in plan.targets:
        if target_plan.target.transposed:
            model.set_submodule(target_plan.target.name, _as_linear(model.get_submodule(target_plan.target.name)))
    # PEFT rounds singular vectors to the weight's dtype; of a 16-bit base they would not be orthonormal.
    weights: dict[str, Any] = {t.target.name: model.get_submodule(t.target.name).weight for t in plan.targets}
    originals = {name: weight.data for name, weight in weights.items()}
    for name, weight in weights.items():
        weight.data = originals[name].float()
    try:
        wrapped = get_peft_model(model, config)
    finally:
        for name, weight in weights.items():
            weight.data = originals[name]
    assert isinstance(wrapped, PeftModel)
    keep_precise(wrapped, plan)
    return wrapped


def _as_linear(module: Any) -> nn.Linear:
    """Convert a Conv1D to a layer that PEFT's OSF takes; weight and bias are shared, not copied."""
    in_features, out_features = module.weight.shape
    linear = nn.Linear(in_features, out_features, device="meta")
    linear.weight = nn.Parameter(module.weight.detach().T, requires_grad=False)
    linear.bias = module.bias
    return linear


def subspace_change(layer: Any) -> Tensor:
    """Returns the change of one weight, ``(m, n)``, float32: the trained part less what it was."""
    with torch.no_grad():
        change: Tensor = layer.get_delta_weight("default")
    return change.float()
