"""The controller of a budget: the multiplier that holds a measured quantity D at it.

    ∇L    = ∇L_task + p min(1 / budget, |∇L_task| / |∇D|) ∇D                                    (1)
    c     = clip(D / budget - 1, -1, 1)
    log λ <- clip(log λ + rate · c, log LEAST, log MOST)                                        (2)
    log p = log λ + gain · c                                        after each measurement      (3)

(2) is dual ascent on D <= budget: λ falls while there is room and rises while there is none, so that there is no
strength to choose. λ is what the whole budget costs, in nats of the task's loss, and how long the gradient of D is
beside the task's where it is limited. Its bounds keep it from winding up where a budget cannot be met yet. (3) is the
proportional part of a PI controller in logarithms: the pressure p is off as soon as there is room again.

The limit in (1): where the task's loss is least within the budget, both gradients are opposite and equally long (but
for what an optimiser makes of them), so that a much longer one is the noise of a few texts. Without it, clipping leaves
the task a hundredth of a step after an overdraft, and D stays far below the budget.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

RATE = 0.1  # for each optimiser step
GAIN = 2.0
LEAST, MOST = 0.01, 4.0
_MET = 0.2  # of the budget


def excess(measured: Tensor, budget: float) -> Tensor:
    """Computes c, from -1 to 1: above 0 where the budget is overdrawn; linear, so that noise in D is no bias."""
    return (measured / budget - 1).clamp(-1, 1)


def ascended(log_multiplier: Tensor, c: Tensor, steps: int = 1) -> Tensor:
    """Computes the next log λ (2), after as many optimiser steps.

    Laws: within the budget it falls, above it rises, by at most ``RATE`` a step, and never past its bounds.
    """
    return (log_multiplier + RATE * steps * c).clamp(math.log(LEAST), math.log(MOST))


def allowed(gradient: Tensor, task: Tensor) -> Tensor:
    """Computes what of ∇D / budget is taken in (1), from its norm and that of the task's gradient.

    Laws: from 0 to 1; what is taken is at most as long as the task's gradient, and all of it where it is shorter.
    """
    return (task / gradient.clamp_min(torch.finfo(gradient.dtype).tiny)).clamp(max=1)


def verdict(measured: float, budget: float) -> str:
    """Returns whether a budget was met within a fifth, was not used up, or was overdrawn."""
    share = measured / budget
    return "overdrawn" if share > 1 + _MET else "met" if share >= 1 - _MET else "not used up"
