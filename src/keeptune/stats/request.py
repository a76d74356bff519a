"""Requests: a method says which statistics of a target it needs; a request's content is its cache key."""

from __future__ import annotations

from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from keeptune.core.target import Target

__all__ = ["Accumulator", "DataRole", "PassKind", "Request"]

DataRole = Literal["knowledge", "task"]
PassKind = Literal["forward"]


class Accumulator(Protocol):
    """Sums a statistic over rows; the result does not depend on how rows are split over calls."""

    def add(self, rows: Tensor) -> None:
        """Add the rows of one batch.

        Args:
            rows: ``(tokens, n)``; padding already removed.
        """
        ...

    def result(self, module: str) -> Tensor:
        """Finish.

        Args:
            module: The module's name, for error messages.

        Returns:
            The statistic, on the CPU.
        """
        ...


class Request(Protocol):
    """A frozen dataclass that names a statistic; two equal requests are the same statistic."""

    version: ClassVar[int]
    kind: ClassVar[PassKind]
    examples_alone: ClassVar[bool]

    @property
    def data(self) -> DataRole:
        """Which data the statistic is taken over."""
        ...

    def site(self, target: Target) -> str:
        """Name where it is measured; targets with equal sites share one entry.

        Args:
            target: The target that needs it.

        Returns:
            A module name.
        """
        ...

    def accumulator(self, target: Target, device: torch.device) -> Accumulator:
        """Start a sum.

        Args:
            target: A target of the site.
            device: Where the sum is kept.

        Returns:
            An empty accumulator.
        """
        ...
