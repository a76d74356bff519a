"""Statistics of inputs and output gradients together: variances along singular directions."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from keeptune.core.target import Target
from keeptune.linalg.decompositions import exact_svd
from keeptune.statistics.request import GradientRequest, PassKind, WeightReader
from keeptune.statistics.running_mean import RunningMean


@dataclass(frozen=True, slots=True)
class DirectionVariances(GradientRequest):
    """``λ_i = E[(v_iᵀ h)²]`` and ``γ_i = E[(u_iᵀ δ)²]`` along the singular directions of W = U S Vᵀ, ``(2, k)``.

    What FARSS's scores need (eq. 14), without ``(n, n)`` and ``(m, m)`` matrices in memory or on disk.
    """

    @property
    def kind(self) -> PassKind:
        """Inputs and gradients together."""
        return "joint"

    def numbers(self, target: Target) -> int:
        """Returns that of the directions that are held beside the sum."""
        return target.out_features * target.in_features

    def accumulator(self, target: Target, device: torch.device, weight: WeightReader) -> RunningMean:
        """Decomposes the weight and returns a sum of squares along its directions."""
        U, _, Vh = exact_svd(weight(), target.name)
        return RunningMean((2, U.shape[1]), device, partial(_add_squares, U=U.to(device), Vh=Vh.to(device)))


def _add_squares(total: Tensor, h: Tensor, delta: Tensor, *, U: Tensor, Vh: Tensor) -> None:
    total[0] += (h.to(Vh) @ Vh.T).square().sum(0)
    total[1] += (delta.to(U) @ U).square().sum(0)
