"""Covariances ``E[h hᵀ]`` of inputs and ``E[δ δᵀ]`` of gradients, whole or along the singular directions of W."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from keeptune.core.target import Target
from keeptune.linalg.decompositions import exact_svd
from keeptune.linalg.gram import add_gram, symmetric
from keeptune.statistics.request import (
    ADDED,
    Accumulator,
    GradientRequest,
    PassKind,
    RowRequest,
    RunningMean,
    WeightReader,
)


@dataclass(frozen=True, slots=True)
class InputCovariance(RowRequest):
    """``Ω = E[h hᵀ]``, ``(n, n)``: uncentred, mean over unmasked tokens, products summed in float64.

    Args:
        precision: ``"single"`` forms products and keeps the mean in float32, ``"double"`` in float64: for the bottom of
            the spectrum (:func:`keeptune.linalg.gram.add_gram`).
    """

    precision: Literal["single", "double"] = field(default="single", kw_only=True, metadata=ADDED)

    def numbers(self, target: Target) -> int:
        """Returns ``n²``."""
        return target.in_features**2

    def kept(self, target: Target) -> int:
        """Returns the bytes of the mean."""
        return (4 if self.precision == "single" else 8) * target.in_features**2

    def accumulator(self, target: Target, device: torch.device, weight: WeightReader) -> RunningMean:
        """Returns a sum of ``h hᵀ``."""
        dtype = torch.float32 if self.precision == "single" else torch.float64
        shape = (target.in_features, target.in_features)
        return RunningMean(shape, device, partial(add_gram, dtype=dtype), symmetric, dtype)


@dataclass(frozen=True, slots=True)
class GradientCovariance(GradientRequest):
    """``Σ_δ = E[δ δᵀ]``, ``(m, m)``, where δ = d loss / d y of the loss summed over the tokens to be learned.

    Uncentred, mean over all unmasked tokens, those of the prompt too: they act on the loss through attention.
    """

    def numbers(self, target: Target) -> int:
        """Returns ``m²``."""
        return target.out_features**2

    def accumulator(self, target: Target, device: torch.device, weight: WeightReader) -> RunningMean:
        """Returns a sum of ``δ δᵀ``."""
        return RunningMean((target.out_features, target.out_features), device, add_gram, symmetric)


@dataclass(frozen=True, slots=True)
class ReleasedCovariance(RowRequest):
    """What LoRA-Null's released code takes for Ω: float16 all through, each example divided by its largest value.

    Kept to show what that costs (``docs/methods/lora-null.md``); not a statistic to build on.
    """

    examples_alone: ClassVar[bool] = True

    def numbers(self, target: Target) -> int:
        """Returns ``n²``."""
        return target.in_features**2

    def accumulator(self, target: Target, device: torch.device, weight: WeightReader) -> _ReleasedSum:
        """Returns a sum over examples."""
        return _ReleasedSum(target.in_features, device)


@dataclass
class _ReleasedSum(Accumulator):
    """Sums ``x̂ᵀ x̂ / 256`` in float16, ``x̂ = x / |max x|`` per example, as the released code does; no mean."""

    in_features: int
    device: torch.device
    tokens: int = 0
    total: Tensor = field(init=False)

    def __post_init__(self) -> None:
        shape = (self.in_features, self.in_features)
        self.total = torch.zeros(shape, dtype=torch.float16, device=self.device)

    def add(self, rows: Tensor) -> None:
        """Adds one example, ``(tokens, n)``."""
        x = rows.to(self.device, torch.float16)
        # The largest signed value, then its size: the released code's order, not the largest size.
        x = x / x.max().abs()
        self.tokens += rows.shape[0]
        self.total += (x.T @ x) / 256

    def result(self) -> Tensor:
        """Returns the sum, float32 holding float16 values."""
        return self.total.float().cpu()


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
