"""The sums behind statistics: one running mean over tokens for all that are means, and the check of every result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from keeptune.core.errors import StatisticsError


class UnseenError(StatisticsError):
    """No token of the data reached a module."""


class Accumulator(Protocol):
    """Sums a statistic over rows; the result does not depend on how rows are split over calls.

    Attributes:
        tokens: How many rows were added.
    """

    tokens: int

    @property
    def add(self) -> Callable[..., None]:
        """Adds the rows of one batch without padding: ``h (tokens, n)``, ``δ (tokens, m)``, or as the kind of pass."""
        ...

    def result(self) -> Tensor:
        """Returns the statistic, on the CPU."""
        ...

    @property
    def sums(self) -> list[Tensor]:
        """The tensors that rows change, zero before: with those of other rows, and ``tokens``, they add up in place."""
        return [value for value in vars(self).values() if isinstance(value, Tensor)]


def checked_result(total: Accumulator, module: str) -> Tensor:
    """Returns the result of a sum of a module, on the CPU.

    Raises:
        UnseenError: No token was added.
        StatisticsError: The result is NaN or infinite somewhere.
    """
    if total.tokens == 0:
        raise UnseenError(
            module,
            got="no tokens",
            wanted="at least one unpadded token",
            next_step="The data never reached this module; leave it out of the targets.",
        )
    value = total.result()
    if not bool(torch.isfinite(value).all()):
        raise StatisticsError(
            module,
            got="NaN or infinite activations or gradients",
            wanted="finite ones",
            next_step="Load the model in float32 or bfloat16 and check the weights of the modules before it.",
        )
    return value


@dataclass
class RunningMean(Accumulator):
    """The mean over tokens of what rows contribute, summed in float64.

    Laws: the result does not depend on how rows are split over calls or over sums that are added up, nor on their
    order (to float64 rounding of the sum).

    Args:
        shape: Shape of the mean.
        device: Where the sum is kept.
        add_terms: Adds the contributions of the rows of one batch to the sum, in place: ``add_terms(total, *rows)``.
        finish: Turns the mean into the statistic.
        dtype: Of the mean.
    """

    shape: tuple[int, ...]
    device: torch.device
    add_terms: Callable[..., None]
    finish: Callable[[Tensor], Tensor] = lambda mean: mean
    dtype: torch.dtype = torch.float32
    tokens: int = 0
    total: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Start from zero."""
        self.total = torch.zeros(self.shape, dtype=torch.float64, device=self.device)

    def add(self, rows: Tensor, *more: Any) -> None:
        """Adds rows ``(tokens, features)`` of a batch, and what a pass hands over beside them: gradients, lengths."""
        batch = (part.to(self.device) if isinstance(part, Tensor) else part for part in (rows, *more))
        self.add_terms(self.total, *batch)
        self.tokens += rows.shape[0]

    def result(self) -> Tensor:
        """Returns the mean on the CPU."""
        mean = torch.empty_like(self.total, dtype=self.dtype)
        for start in range(0, len(mean), 256):  # a float64 copy of the whole would be the peak of memory
            mean[start : start + 256] = self.total[start : start + 256] / self.tokens
        return self.finish(mean).cpu()
