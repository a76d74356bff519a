"""The mean of a target's inputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from keeptune.core.target import Target
from keeptune.model.runner import Labels
from keeptune.statistics.request import DataRole, PassKind, WeightReader
from keeptune.statistics.validation import finite, need_tokens

__all__ = ["InputMean", "MeanAccumulator"]


@dataclass(frozen=True, slots=True)
class InputMean:
    """``μ = E[h]``, ``(n,)``: over unmasked tokens. With ``Ω = E[h hᵀ]`` it gives the centred covariance ``Ω - μ μᵀ``.

    Args:
        data: Which data.
    """

    data: DataRole
    version: ClassVar[int] = 1
    kind: ClassVar[PassKind] = "forward"
    labels: ClassVar[Labels | None] = None
    seed: ClassVar[int] = 0
    examples_alone: ClassVar[bool] = False
    examples: ClassVar[int | None] = None

    def numbers(self, target: Target) -> int:
        """Count the sum's numbers: ``n``."""
        return target.in_features

    def site(self, target: Target) -> str:
        """Name the input group."""
        return target.input_group

    def accumulator(self, target: Target, device: torch.device, weight: WeightReader) -> MeanAccumulator:
        """Start a sum."""
        return MeanAccumulator(target.in_features, device)


@dataclass
class MeanAccumulator:
    """Sums inputs over tokens in float64; how rows are split over calls changes rounding only.

    Args:
        in_features: n.
        device: Where the sum is kept.
    """

    in_features: int
    device: torch.device
    tokens: int = 0
    total: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Start from zero."""
        self.total = torch.zeros(self.in_features, dtype=torch.float64, device=self.device)

    def add(self, rows: Tensor) -> None:
        """Add the rows of one batch.

        Args:
            rows: ``(tokens, n)``.
        """
        self.total += rows.to(self.device).sum(dim=0, dtype=torch.float64)
        self.tokens += rows.shape[0]

    def merge(self, other: MeanAccumulator) -> None:
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
            ``(n,)``, float32, on the CPU.

        Raises:
            StatisticsError: No token was seen, or an activation was NaN or infinite.
        """
        need_tokens(self.tokens, module)
        return finite((self.total / self.tokens).float().cpu(), module)
