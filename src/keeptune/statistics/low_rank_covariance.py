"""Covariances kept as their top k directions and a scalar: no n x n matrix, neither in memory nor on disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from keeptune.core.target import Target
from keeptune.linalg.streaming_eigen import TopDirections, Truncated
from keeptune.linalg.symmetric import Dense, LowRankPlus, PsdMatrix
from keeptune.model.runner import Labels
from keeptune.statistics.covariance import GradientCovariance, InputCovariance
from keeptune.statistics.request import DataRole, PassKind, WeightReader
from keeptune.statistics.validation import finite, need_tokens

__all__ = [
    "Covariance",
    "GradientFactor",
    "InputFactor",
    "TopAccumulator",
    "gradient_request",
    "input_request",
    "packed",
    "read_factor",
    "unpacked",
]


@dataclass(frozen=True, slots=True)
class InputFactor:
    """``Ω = E[h hᵀ]`` as its top directions and a scalar, ``(k + 1, n + 2)``; read it with :func:`read_factor`.

    Args:
        data: Which data.
        rank: How many directions.
        seed: Seed of the search and of the error's estimate.
        examples: How many examples of each set, the first ones; None is all.
    """

    data: DataRole
    rank: int
    seed: int = 0
    examples: int | None = None
    version: ClassVar[int] = 1
    kind: ClassVar[PassKind] = "forward"
    labels: ClassVar[Labels | None] = None
    examples_alone: ClassVar[bool] = False

    def numbers(self, target: Target) -> int:
        """Count the buffer's numbers: ``9 k n``."""
        return 9 * self.rank * target.in_features

    def site(self, target: Target) -> str:
        """Name the input group."""
        return target.input_group

    def accumulator(self, target: Target, device: torch.device, weight: WeightReader) -> TopAccumulator:
        """Start a sum."""
        return TopAccumulator(TopDirections(target.in_features, self.rank, device, self.seed))


@dataclass(frozen=True, slots=True)
class GradientFactor:
    """``Γ = E[δ δᵀ]`` as its top directions and a scalar, ``(k + 1, m + 2)``; read it with :func:`read_factor`.

    Args:
        data: Which data; without prompts and completions, whole texts are learned, all tokens but the first.
        labels: ``"true"`` or ``"sampled"``.
        rank: How many directions.
        seed: Seed of the drawn labels, of the search and of the error's estimate.
        examples: How many examples of each set, the first ones; None is all.
    """

    data: DataRole
    labels: Labels
    rank: int
    seed: int = 0
    examples: int | None = None
    version: ClassVar[int] = 1
    kind: ClassVar[PassKind] = "backward"
    examples_alone: ClassVar[bool] = False

    def numbers(self, target: Target) -> int:
        """Count the buffer's numbers: ``9 k m``."""
        return 9 * self.rank * target.out_features

    def site(self, target: Target) -> str:
        """Name the target itself."""
        return target.name

    def accumulator(self, target: Target, device: torch.device, weight: WeightReader) -> TopAccumulator:
        """Start a sum."""
        return TopAccumulator(TopDirections(target.out_features, self.rank, device, self.seed))


Covariance = InputCovariance | GradientCovariance | InputFactor | GradientFactor


@dataclass
class TopAccumulator:
    """Takes rows in, gives one tensor out.

    Args:
        top: Finds the directions.
    """

    top: TopDirections

    def add(self, rows: Tensor) -> None:
        """Add the rows of one batch.

        Args:
            rows: ``(tokens, n)``; padding already removed.
        """
        self.top.add(rows)

    def result(self, module: str) -> Tensor:
        """Finish.

        Args:
            module: The module's name, for the error message.

        Returns:
            ``(k + 1, n + 2)``, float32, on the CPU.

        Raises:
            StatisticsError: No token was seen, or a row was NaN or infinite.
        """
        need_tokens(self.top.tokens, module)
        finite(self.top.trace, module)
        return finite(packed(self.top.result()).float().cpu(), module)


def input_request(data: DataRole, rank: int | None, *, seed: int = 0, examples: int | None = None) -> Covariance:
    """Ask for Ω whole, or for its top directions.

    Args:
        data: Which data.
        rank: How many directions; None is the whole matrix.
        seed: Seed of the search for directions.
        examples: How many examples of each set; None is all.

    Returns:
        The request, to be read with :func:`read_factor`.
    """
    return InputCovariance(data, examples) if rank is None else InputFactor(data, rank, seed, examples)


def gradient_request(
    data: DataRole, labels: Labels, rank: int | None, *, seed: int = 0, examples: int | None = None
) -> Covariance:
    """Ask for Γ whole, or for its top directions.

    Args:
        data: Which data.
        labels: ``"true"`` or ``"sampled"``.
        rank: How many directions; None is the whole matrix.
        seed: Seed of drawn labels and of the search.
        examples: How many examples of each set; None is all.

    Returns:
        The request, to be read with :func:`read_factor`.
    """
    if rank is None:
        return GradientCovariance(data, labels, seed, examples)
    return GradientFactor(data, labels, rank, seed, examples)


def read_factor(request: Covariance, value: Tensor) -> PsdMatrix:
    """Read a covariance as a factor to multiply with.

    Args:
        request: What was asked for.
        value: What was collected.

    Returns:
        The factor.
    """
    return unpacked(value).factor if isinstance(request, InputFactor | GradientFactor) else Dense(value)


def packed(found: Truncated) -> Tensor:
    """Write a factor and its error as one tensor: rows ``[λ_i, 0, u_i]``, the last one ``[ρ, error, 0]``.

    Law: ``unpacked(packed(x))`` is x.

    Args:
        found: The factor, k directions of n numbers.

    Returns:
        ``(k + 1, n + 2)``.
    """
    factor = found.factor
    table = factor.U.new_zeros(factor.rank + 1, factor.size + 2)
    table[:-1, 0], table[:-1, 2:] = factor.values, factor.U.T
    table[-1, 0], table[-1, 1] = factor.remainder, found.error
    return table


def unpacked(table: Tensor) -> Truncated:
    """Read what :func:`packed` wrote.

    Args:
        table: ``(k + 1, n + 2)``.

    Returns:
        The factor and its error.
    """
    factor = LowRankPlus(table[:-1, 2:].T.contiguous(), table[:-1, 0].contiguous(), table[-1, 0].clone())
    return Truncated(factor, float(table[-1, 1]))
