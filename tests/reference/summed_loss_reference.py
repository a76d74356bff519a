"""Penalties as their definitions read: dense changes, and autograd through the sum of the task's loss and them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from keeptune.adapter.install import held_parameters
from keeptune.core.plan import Plan
from keeptune.core.weights import read_weight
from keeptune.penalties.l2 import L2

__all__ = ["penalty", "summed_gradients"]


def penalty(model: Any, plan: Plan, base: Any, spec: Any) -> Tensor:
    """One penalty of the model as it is now, from m x n matrices."""
    total = torch.zeros((), dtype=torch.float64)
    for t in plan.targets:
        now = {name: held.of(held.parameter).double() for name, held in held_parameters(model, t).items()}
        A, B = now["A"], now["B"]
        assert isinstance(spec, L2)
        assert spec.layers == "uniform"
        over = 1.0
        if spec.unit == "relative":
            over = len(plan.targets) * read_weight(base, t.target).double().square().sum()
        if spec.on == "factors":
            size = A.square().sum() + B.square().sum()
            if spec.unit == "relative":
                over = len(plan.targets) * sum(part.double().square().sum() for part in (t.init.A, t.init.B))
        else:
            size = (t.scale * (B @ A - t.init.B.double() @ t.init.A.double())).square().sum()
        total = total + spec.strength * size / over
    return total


def summed_gradients(
    model: Any, plan: Plan, base: Any, specs: Sequence[Any], ids: Tensor
) -> tuple[dict[str, Tensor], float]:
    """The gradients of the task's loss with the penalties, and what the penalties are."""
    model.zero_grad()
    held = torch.stack([penalty(model, plan, base, spec) for spec in specs]).sum()
    (model(input_ids=ids, labels=ids).loss + held).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found, float(held.detach())
