"""Statistics of inputs and output gradients together: the weight's gradient, variances along singular directions."""

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
class _JointRequest(GradientRequest):
    """A sum over inputs and output gradients together, of about as many numbers as the weight has."""

    @property
    def kind(self) -> PassKind:
        """Inputs and gradients together."""
        return "joint"

    def numbers(self, target: Target) -> int:
        """Returns ``mn``; of variances, that of the directions that are held beside the sum."""
        return target.out_features * target.in_features


@dataclass(frozen=True, slots=True)
class WeightGradient(_JointRequest):
    """``G = E[δ hᵀ]``, ``(m, n)``: the gradient of the summed loss over the number of unmasked tokens."""

    def accumulator(self, target: Target, device: torch.device, weight: WeightReader) -> RunningMean:
        """Returns a sum of ``δ hᵀ``, products in float32."""
        return RunningMean((target.out_features, target.in_features), device, _add_products)


def _add_products(total: Tensor, h: Tensor, delta: Tensor) -> None:
    total += delta.float().T @ h.float()


@dataclass(frozen=True, slots=True)
class DirectionVariances(_JointRequest):
    """``λ_i = E[(v_iᵀ h)²]`` and ``γ_i = E[(u_iᵀ δ)²]`` along the singular directions of W = U S Vᵀ, ``(2, k)``.

    What FARSS's scores need (eq. 14), without ``(n, n)`` and ``(m, m)`` matrices in memory or on disk.
    """

    def accumulator(self, target: Target, device: torch.device, weight: WeightReader) -> RunningMean:
        """Decomposes the weight and returns a sum of squares along its directions."""
        U, _, Vh = exact_svd(weight(), target.name)
        return RunningMean((2, U.shape[1]), device, partial(_add_squares, U=U.to(device), Vh=Vh.to(device)))


def _add_squares(total: Tensor, h: Tensor, delta: Tensor, *, U: Tensor, Vh: Tensor) -> None:
    total[0] += (h.to(Vh) @ Vh.T).square().sum(0)
    total[1] += (delta.to(U) @ U).square().sum(0)
