"""Input covariances: ``Ω = E[h hᵀ]`` as it should be, and as LoRA-Null's released code computes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from keeptune.core.errors import StatisticsError
from keeptune.core.target import Target
from keeptune.linalg.gram import add_gram, symmetric
from keeptune.stats.request import DataRole, PassKind

__all__ = ["CovarianceAccumulator", "InputCovariance", "ReleasedAccumulator", "ReleasedCovariance"]


@dataclass(frozen=True, slots=True)
class InputCovariance:
    """``Ω = E[h hᵀ]``, ``(n, n)``: uncentred, mean over unmasked tokens, float32 products summed in float64.

    Args:
        data: Which data.
    """

    data: DataRole
    version: ClassVar[int] = 1
    kind: ClassVar[PassKind] = "forward"
    examples_alone: ClassVar[bool] = False

    def site(self, target: Target) -> str:
        """Name the input group: q/k/v share one covariance."""
        return target.input_group

    def accumulator(self, target: Target, device: torch.device) -> CovarianceAccumulator:
        """Start a sum."""
        return CovarianceAccumulator(target.in_features, device)


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
    examples_alone: ClassVar[bool] = True

    def site(self, target: Target) -> str:
        """Name the input group."""
        return target.input_group

    def accumulator(self, target: Target, device: torch.device) -> ReleasedAccumulator:
        """Start a sum."""
        return ReleasedAccumulator(target.in_features, device)


@dataclass
class CovarianceAccumulator:
    """Sums ``h hᵀ`` over tokens.

    Laws: the result does not depend on how rows are split over ``add`` calls or over accumulators that
    are merged, nor on their order (to float64 rounding of the sum).

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
            StatisticsError: No token was seen, or an activation was NaN or infinite.
        """
        if self.tokens == 0:
            raise StatisticsError(
                module,
                got="no tokens",
                wanted="at least one unpadded token",
                next_step="The data never reached this module; leave it out of the targets.",
            )
        return _finite(symmetric(self.total / self.tokens).float().cpu(), module)


@dataclass
class ReleasedAccumulator:
    """Sums ``x̂ᵀ x̂ / 256`` in float16, ``x̂ = x / |max x|`` per example, as the released code does.

    Args:
        in_features: n.
        device: Where the ``(n, n)`` sum is kept.
    """

    in_features: int
    device: torch.device
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
        self.total += (x.T @ x) / 256

    def result(self, module: str) -> Tensor:
        """Finish.

        Args:
            module: The module's name, for the error message.

        Returns:
            ``(n, n)``, float32 holding float16 values, on the CPU.

        Raises:
            StatisticsError: The float16 sum is not finite.
        """
        return _finite(self.total.float().cpu(), module)


def _finite(matrix: Tensor, module: str) -> Tensor:
    if not torch.isfinite(matrix).all():
        raise StatisticsError(
            module,
            got="NaN or infinite activations in its input",
            wanted="finite activations",
            next_step="Load the model in float32 or bfloat16 and check the weights of the modules before it.",
        )
    return matrix
