"""The controller of a budget: the multiplier that holds a measured quantity D at it.

    L     = L_task + p D / budget                                                               (1)
    c     = clip(D / budget - 1, -1, 1)
    log λ <- clip(log λ + rate · c, log LEAST, log MOST)                                        (2)
    log p = log λ + gain · c                                        after each measurement      (3)

(2) is dual ascent on D <= budget: λ falls while there is room and rises while there is none, so that there is no
strength to choose. λ is what the whole budget costs, in nats of the task's loss. Its bounds keep it from winding up
where a budget cannot be met yet: no overdraft is worth more than all of the task's loss. (3) is the proportional part
of a PI controller in logarithms: the pressure p is off as soon as there is room again.
"""

from __future__ import annotations

import math

from torch import Tensor

RATE = 0.1  # for each optimiser step
GAIN = 2.0
LEAST, MOST = 0.01, 1.0
_MET = 0.2  # of the budget


def excess(measured: Tensor, budget: float) -> Tensor:
    """Computes c, from -1 to 1: above 0 where the budget is overdrawn; linear, so that noise in D is no bias."""
    return (measured / budget - 1).clamp(-1, 1)


def ascended(log_multiplier: Tensor, c: Tensor, steps: int = 1) -> Tensor:
    """Computes the next log λ (2), after as many optimiser steps.

    Laws: within the budget it falls, above it rises, by at most ``RATE`` a step, and never past its bounds.
    """
    return (log_multiplier + RATE * steps * c).clamp(math.log(LEAST), math.log(MOST))


def verdict(measured: float, budget: float) -> str:
    """Returns whether a budget was met within a fifth, was not used up, or was overdrawn."""
    share = measured / budget
    return "overdrawn" if share > 1 + _MET else "met" if share >= 1 - _MET else "not used up"
