"""What an export must hold, by dense algebra on the weights alone."""

from __future__ import annotations

from torch import Tensor

from keeptune.core.plan import TargetPlan


def change(target_plan: TargetPlan, B: Tensor, A: Tensor) -> Tensor:
    """``s (B A - B0 A0)``, ``(m, n)``, float64; a start of zero is subtracted as well."""
    start = target_plan.init.B.double() @ target_plan.init.A.double()
    return target_plan.scale * (B.double() @ A.double() - start)


def tuned_weight(stored: Tensor, target_plan: TargetPlan, B: Tensor, A: Tensor) -> Tensor:
    """The whole weight as the module stores it: original plus change."""
    delta = change(target_plan, B, A)
    return stored.double() + (delta.T if target_plan.target.transposed else delta)
