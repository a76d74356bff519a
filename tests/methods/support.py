"""One target, weights with known spectra, and a plan for them: what the tests of starting points need."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tests.models import GivenStats
from torch import Tensor

from keeptune.core.plan import Decision, TargetPlan
from keeptune.core.target import Target

SHAPES = {"square": (24, 24), "wide": (16, 40), "tall": (40, 16)}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_singular_values(shape: tuple[int, int], S: Tensor, seed: int = 0) -> Tensor:
    """A matrix with these singular values, descending."""
    U = torch.linalg.qr(normal(shape[0], len(S), seed=seed))[0]
    V = torch.linalg.qr(normal(shape[1], len(S), seed=seed + 1))[0]
    return (U * S.double()) @ V.T


def _spectrum(values: Callable[[int], Tensor]) -> Callable[[tuple[int, int]], Tensor]:
    return lambda shape: with_singular_values(shape, values(min(shape)))


# The rank is at most 16; "tied" has equal singular values across any cut, "deficient" has zeros.
WEIGHTS: dict[str, Callable[[tuple[int, int]], Tensor]] = {
    "random": lambda shape: normal(*shape, seed=7),
    "falling": _spectrum(lambda k: torch.logspace(0, -4, k)),
    "tied": _spectrum(torch.ones),
    "deficient": _spectrum(lambda k: torch.cat([torch.linspace(2, 1, k // 2), torch.zeros(k - k // 2)])),
}
UNIQUE = ["random", "falling"]


def weight(name: str, shape: str = "wide") -> Tensor:
    """A named weight, float32 as methods get it."""
    return WEIGHTS[name](SHAPES[shape]).float()


def target_of(W: Tensor, name: str = "h.0.up") -> Target:
    return Target(name, 0, "up", *W.shape, input_group=name)


def built(method: Any, W: Tensor, *, stats: GivenStats | None = None, name: str = "h.0.up") -> TargetPlan:
    """What a method plans for one weight."""
    plan: TargetPlan = method.build(target_of(W, name), W, stats or GivenStats(), Decision(method.rank))
    return plan


def residual(W: Tensor, plan: TargetPlan) -> Tensor:
    """What is left of W once the start is taken out, float64."""
    return W.double() - plan.scale * plan.init.B.double() @ plan.init.A.double()
