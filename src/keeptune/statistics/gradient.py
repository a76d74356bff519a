"""Statistics of inputs and output gradients together: the weight's gradient, variances along singular directions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from keeptune.core.target import Target
from keeptune.linalg.decompositions import exact_svd
from keeptune.model.runner import Labels
from keeptune.statistics.request import DataRole, PassKind, WeightReader
from keeptune.statistics.validation import finite, need_tokens

__all__ = ["DirectionVariances", "WeightGradient"]


@dataclass(frozen=True, slots=True)
class WeightGradient:
    """``G = E[δ hᵀ]``, ``(m, n)``: the gradient of the summed loss over the number of unmasked tokens.

    Args:
        data: Which data; they must hold completions.
        labels: ``"true"`` or ``"sampled"``.
        seed: Seed of the drawn labels.
    """

    data: DataRole
    labels: Labels
    seed: int = 0
    version: ClassVar[int] = 1
    kind: ClassVar[PassKind] = "joint"
    examples_alone: ClassVar[bool] = False
    examples: ClassVar[int | None] = None

    def numbers(self, target: Target) -> int:
        """Count the sum's numbers: ``mn``."""
        return target.out_features * target.in_features

    def site(self, target: Target) -> str:
        """Name the target itself."""
        return target.name

    def accumulator(self, target: Target, device: torch.device, weight: WeightReader) -> WeightGradientAccumulator:
        """Start a sum."""
        return WeightGradientAccumulator(target.out_features, target.in_features, device)


@dataclass
class WeightGradientAccumulator:
    """Sums ``δ hᵀ`` over tokens, products in float32, the sum in float64.

    Args:
        out_features: m.
        in_features: n.
        device: Where the ``(m, n)`` sum is kept.
    """

    out_features: int
    in_features: int
    device: torch.device
    tokens: int = 0
    total: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Start from zero."""
        self.total = torch.zeros(self.out_features, self.in_features, dtype=torch.float64, device=self.device)

    def add(self, h: Tensor, delta: Tensor) -> None:
        """Add the rows of one batch.

        Args:
            h: ``(tokens, n)``.
            delta: ``(tokens, m)``.
        """
        self.total += delta.to(self.device, torch.float32).T @ h.to(self.device, torch.float32)
        self.tokens += h.shape[0]

    def merge(self, other: WeightGradientAccumulator) -> None:
        """Add what another accumulator saw.

        Args:
            other: An accumulator of the same module.
        """
        self.total += other.total.to(self.device)
        self.tokens += other.tokens

    def result(self, module: str) -> Tensor:
        """Finish.

        Args:
            module: The module's name, for the error message.

        Returns:
            ``(m, n)``, float32, on the CPU.

        Raises:
            StatisticsError: No token was seen, or a row was NaN or infinite.
        """
        need_tokens(self.tokens, module)
        return finite((self.total / self.tokens).float().cpu(), module)


@dataclass(frozen=True, slots=True)
class DirectionVariances:
    """``λ_i = E[(v_iᵀ h)²]`` and ``γ_i = E[(u_iᵀ δ)²]`` along the singular directions of W = U S Vᵀ, ``(2, k)``.

    What FARSS's scores need (eq. 14), without ``(n, n)`` and ``(m, m)`` matrices in memory or on disk.

    Args:
        data: Which data; they must hold completions.
        labels: ``"true"`` or ``"sampled"``.
        seed: Seed of the drawn labels.
    """

    data: DataRole
    labels: Labels
    seed: int = 0
    version: ClassVar[int] = 1
    kind: ClassVar[PassKind] = "joint"
    examples_alone: ClassVar[bool] = False
    examples: ClassVar[int | None] = None

    def numbers(self, target: Target) -> int:
        """Count the sum's numbers: with the directions, about ``mn``."""
        return target.out_features * target.in_features

    def site(self, target: Target) -> str:
        """Name the target itself."""
        return target.name

    def accumulator(self, target: Target, device: torch.device, weight: WeightReader) -> DirectionAccumulator:
        """Decompose the weight and start a sum."""
        U, _, Vh = exact_svd(weight(), target.name)
        return DirectionAccumulator(U.to(device), Vh.to(device))


@dataclass
class DirectionAccumulator:
    """Sums the squares of inputs and gradients along singular directions.

    Args:
        U: ``(m, k)``.
        Vh: ``(k, n)``.
    """

    U: Tensor
    Vh: Tensor
    tokens: int = 0
    total: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Start from zero."""
        self.total = torch.zeros(2, self.U.shape[1], dtype=torch.float64, device=self.U.device)

    def add(self, h: Tensor, delta: Tensor) -> None:
        """Add the rows of one batch.

        Args:
            h: ``(tokens, n)``.
            delta: ``(tokens, m)``.
        """
        self.total[0] += (h.to(self.Vh) @ self.Vh.T).square().sum(0)
        self.total[1] += (delta.to(self.U) @ self.U).square().sum(0)
        self.tokens += h.shape[0]

    def merge(self, other: DirectionAccumulator) -> None:
        """Add what another accumulator saw.

        Args:
            other: An accumulator of the same module.
        """
        self.total += other.total.to(self.total.device)
        self.tokens += other.tokens

    def result(self, module: str) -> Tensor:
        """Finish.

        Args:
            module: The module's name, for the error message.

        Returns:
            λ and γ, ``(2, k)``, float32, on the CPU.

        Raises:
            StatisticsError: No token was seen, or a row was NaN or infinite.
        """
        need_tokens(self.tokens, module)
        return finite((self.total / self.tokens).float().cpu(), module)
