"""Covariances ``E[h hᵀ]`` of inputs and ``E[δ δᵀ]`` of gradients, and what LoRA-Null's released code takes for one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from keeptune.core.target import Target
from keeptune.linalg.gram import add_gram, symmetric
from keeptune.model.runner import Labels
from keeptune.statistics.request import DataRole, PassKind, WeightReader
from keeptune.statistics.validation import finite, need_tokens

__all__ = [
    "CovarianceAccumulator",
    "GradientCovariance",
    "InputCovariance",
    "ReleasedAccumulator",
    "ReleasedCovariance",
]


@dataclass(frozen=True, slots=True)
class InputCovariance:
    """``Ω = E[h hᵀ]``, ``(n, n)``: uncentred, mean over unmasked tokens, float32 products summed in float64.

    Args:
        data: Which data.
        examples: How many examples of each set, the first ones; None is all.
    """

    data: DataRole
    examples: int | None = None
    version: ClassVar[int] = 1
    kind: ClassVar[PassKind] = "forward"
    labels: ClassVar[Labels | None] = None
    seed: ClassVar[int] = 0
    examples_alone: ClassVar[bool] = False

    def numbers(self, target: Target) -> int:
        """Count the sum's numbers: ``n²``."""
        return target.in_features**2

    def site(self, target: Target) -> str:
        """Name the input group: q/k/v share one covariance."""
        return target.input_group

    def accumulator(self, target: Target, device: torch.device, weight: WeightReader) -> CovarianceAccumulator:
        """Start a sum."""
        return CovarianceAccumulator(target.in_features, device)


@dataclass(frozen=True, slots=True)
class GradientCovariance:
    """``Σ_δ = E[δ δᵀ]``, ``(m, m)``, where δ = d loss / d y of the loss summed over the tokens to be learned.

    Uncentred, mean over all unmasked tokens, those of the prompt too: they act on the loss through attention.

    Args:
        data: Which data; without prompts and completions, whole texts are learned, all tokens but the first.
        labels: ``"true"`` takes the data's tokens (empirical Fisher), ``"sampled"`` the model's own (Fisher).
        seed: Seed of the drawn labels.
        examples: How many examples of each set, the first ones; None is all.
    """

    data: DataRole
    labels: Labels
    seed: int = 0
    examples: int | None = None
    version: ClassVar[int] = 1
    kind: ClassVar[PassKind] = "backward"
    examples_alone: ClassVar[bool] = False

    def numbers(self, target: Target) -> int:
        """Count the sum's numbers: ``m²``."""
        return target.out_features**2

    def site(self, target: Target) -> str:
        """Name the target itself: every map has outputs of its own."""
        return target.name

    def accumulator(self, target: Target, device: torch.device, weight: WeightReader) -> CovarianceAccumulator:
        """Start a sum."""
        return CovarianceAccumulator(target.out_features, device)


@dataclass(frozen=True, slots=True)
class ReleasedCovariance:
    """What LoRA-Null's released code takes for Ω: float16 all through, each example divided by its largest value.

    Kept to show what that costs (``docs/methods/lora-null.md``); not a statistic to build on.

    Args:
        data: Which data.
    """

    data: DataRole
    version: ClassVar[int] = 1
    kind: ClassVar[PassKind] = "forward"
    labels: ClassVar[Labels | None] = None
    seed: ClassVar[int] = 0
    examples_alone: ClassVar[bool] = True
    examples: ClassVar[int | None] = None

    def numbers(self, target: Target) -> int:
        """Count the sum's numbers: ``n²``."""
        return target.in_features**2

    def site(self, target: Target) -> str:
        """Name the input group."""
        return target.input_group

    def accumulator(self, target: Target, device: torch.device, weight: WeightReader) -> ReleasedAccumulator:
        """Start a sum."""
        return ReleasedAccumulator(target.in_features, device)


@dataclass
class CovarianceAccumulator:
    """Sums ``x xᵀ`` over tokens.

    Laws: the result does not depend on how rows are split over ``add`` calls or over accumulators that
    are merged, nor on their order (to float64 rounding of the sum).

    Args:
        features: n.
        device: Where the ``(n, n)`` sum is kept.
    """

    features: int
    device: torch.device
    tokens: int = 0
    total: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Start from zero."""
        shape = (self.features, self.features)
        self.total = torch.zeros(shape, dtype=torch.float64, device=self.device)

    def add(self, rows: Tensor) -> None:
        """Add the rows of one batch.

        Args:
            rows: ``(tokens, n)``; padding already removed.
        """
        add_gram(self.total, rows.to(self.device))
        self.tokens += rows.shape[0]

    def merge(self, other: CovarianceAccumulator) -> None:
        """Add what another accumulator saw (another shard of the data).

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
            ``(n, n)``, float32, on the CPU.

        Raises:
            StatisticsError: No token was seen, or a row was NaN or infinite.
        """
        need_tokens(self.tokens, module)
        mean = torch.empty_like(self.total, dtype=torch.float32)
        for start in range(0, len(mean), 256):  # a float64 copy of the whole would be the peak of memory
            mean[start : start + 256] = self.total[start : start + 256] / self.tokens
        return finite(symmetric(mean).cpu(), module)


@dataclass
class ReleasedAccumulator:
    """Sums ``x̂ᵀ x̂ / 256`` in float16, ``x̂ = x / |max x|`` per example, as the released code does.

    Args:
        in_features: n.
        device: Where the ``(n, n)`` sum is kept.
    """

    in_features: int
    device: torch.device
    tokens: int = 0
    total: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Start from zero."""
        shape = (self.in_features, self.in_features)
        self.total = torch.zeros(shape, dtype=torch.float16, device=self.device)

    def add(self, rows: Tensor) -> None:
        """Add one example.

        Args:
            rows: ``(tokens, n)`` of one example alone.
        """
        x = rows.to(self.device, torch.float16)
        # The largest signed value, then its size: the released code's order, not the largest size.
        x = x / x.max().abs()
        self.tokens += rows.shape[0]
        self.total += (x.T @ x) / 256

    def result(self, module: str) -> Tensor:
        """Finish.

        Args:
            module: The module's name, for the error message.

        Returns:
            ``(n, n)``, float32 holding float16 values, on the CPU.

        Raises:
            StatisticsError: No token was seen, or the float16 sum is not finite.
        """
        need_tokens(self.tokens, module)
        return finite(self.total.float().cpu(), module)
