"""Requests: a method says which statistics of a target it needs; a request's content is its cache key."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from keeptune.core.target import Target
from keeptune.model.runner import Labels

__all__ = ["Accumulator", "DataRole", "Labels", "PassKind", "Request", "WeightReader"]

DataRole = Literal["knowledge", "task"]
# What is added: inputs h, output gradients δ, both at once, both with the number of rows of each text; a trace adds
# nothing.
PassKind = Literal["forward", "backward", "joint", "texts", "trace"]
WeightReader = Callable[[], Tensor]


class Accumulator(Protocol):
    """Sums a statistic over rows; the result does not depend on how rows are split over calls."""

    @property
    def add(self) -> Callable[..., None]:
        """Add the rows of one batch, padding already removed: ``h (tokens, n)``, ``δ (tokens, m)``, or h and δ."""
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
    examples_alone: ClassVar[bool]

    @property
    def kind(self) -> PassKind:
        """What is added."""
        ...

    @property
    def data(self) -> DataRole:
        """Which data the statistic is taken over."""
        ...

    @property
    def labels(self) -> Labels | None:
        """Where the loss takes its labels from; None without a loss."""
        ...

    @property
    def seed(self) -> int:
        """Seed of drawn labels."""
        ...

    @property
    def examples(self) -> int | None:
        """How many examples of each set of the data are used, the first ones; None is all.

        Not a part of the cache key itself: the data's fingerprint is that of the examples used.
        """
        ...

    def numbers(self, target: Target) -> int:
        """Count the numbers that its sum holds.

        Args:
            target: A target of the site.

        Returns:
            How many.
        """
        ...

    def site(self, target: Target) -> str:
        """Name where it is measured; targets with equal sites share one entry.

        Args:
            target: The target that needs it.

        Returns:
            A module name.
        """
        ...

    def accumulator(self, target: Target, device: torch.device, weight: WeightReader) -> Accumulator:
        """Start a sum.

        Args:
            target: A target of the site.
            device: Where the sum is kept.
            weight: Reads the target's weight, ``(m, n)`` float32, for sums that need it.

        Returns:
            An empty accumulator.
        """
        ...
