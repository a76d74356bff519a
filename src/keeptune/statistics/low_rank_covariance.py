"""Covariances kept as their top k directions and a scalar: no n x n matrix, neither in memory nor on disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from keeptune.core.target import Target
from keeptune.linalg.streaming_eigen import TopDirections, Truncated
from keeptune.linalg.symmetric import Dense, LowRankPlus, PsdMatrix
from keeptune.model.summed_loss import Labels
from keeptune.statistics.covariance import GradientCovariance, InputCovariance
from keeptune.statistics.request import DataRole, GradientRequest, RowRequest, WeightReader


@dataclass(frozen=True, slots=True)
class InputFactor(RowRequest):
    """``Ω = E[h hᵀ]`` as its top directions and a scalar, ``(k + 1, n + 2)``; read it with :func:`read_factor`.

    The seed is that of the search for directions and of the error's estimate.
    """

    rank: int
    seed: int = 0

    def numbers(self, target: Target) -> int:
        """Returns the buffer's ``9 k n``."""
        return 9 * self.rank * target.in_features

    def kept(self, target: Target) -> int:
        """Returns the bytes of ``(k + 1, n + 2)``."""
        return 4 * (self.rank + 1) * (target.in_features + 2)

    def accumulator(self, target: Target, device: torch.device, weight: WeightReader) -> _TopSum:
        """Returns an empty buffer."""
        return _TopSum(TopDirections(target.in_features, self.rank, device, self.seed))


@dataclass(frozen=True, slots=True)
class GradientFactor(GradientRequest):
    """``Γ = E[δ δᵀ]`` as its top directions and a scalar, ``(k + 1, m + 2)``; read it with :func:`read_factor`.

    The seed is that of the draws, of the search and of the error's estimate.
    """

    rank: int

    def numbers(self, target: Target) -> int:
        """Returns the buffer's ``9 k m``."""
        return 9 * self.rank * target.out_features

    def kept(self, target: Target) -> int:
        """Returns the bytes of ``(k + 1, m + 2)``."""
        return 4 * (self.rank + 1) * (target.out_features + 2)

    def accumulator(self, target: Target, device: torch.device, weight: WeightReader) -> _TopSum:
        """Returns an empty buffer."""
        return _TopSum(TopDirections(target.out_features, self.rank, device, self.seed))


Covariance = InputCovariance | GradientCovariance | InputFactor | GradientFactor


@dataclass
class _TopSum:
    """The top directions of rows as an accumulator."""

    top: TopDirections
    tokens: int = 0

    def add(self, rows: Tensor) -> None:
        """Adds the rows of one batch."""
        self.top.add(rows)
        self.tokens += rows.shape[0]

    def result(self) -> Tensor:
        """Returns ``(k + 1, n + 2)``; the trace where it is not finite: no eigenvectors exist then."""
        if not bool(self.top.trace.isfinite()):
            return self.top.trace.cpu()
        return packed(self.top.result()).float().cpu()


def input_request(data: DataRole, rank: int | None, *, seed: int = 0, examples: int | None = None) -> Covariance:
    """Returns the request for Ω whole (rank None), or for its top directions; :func:`read_factor` reads its value."""
    if rank is None:
        return InputCovariance(data, examples=examples)
    return InputFactor(data, rank, seed, examples=examples)


def gradient_request(data: DataRole, labels: Labels, rank: int | None, **draws: Any) -> Covariance:
    """Returns the request for Γ whole (rank None), or for its top directions; :func:`read_factor` reads its value.

    ``draws`` are the request's ``seed``, ``probes`` and ``examples``.
    """
    if rank is None:
        return GradientCovariance(data, labels, **draws)
    return GradientFactor(data, labels, rank, **draws)


def read_factor(request: Covariance, value: Tensor) -> PsdMatrix:
    """Returns the collected value of a request as a factor to multiply with."""
    return unpacked(value).factor if isinstance(request, InputFactor | GradientFactor) else Dense(value)


def factor_bytes(request: Covariance, width: int) -> int:
    """Returns the bytes of the factor's matrix that :func:`read_factor` reads, of a covariance of a width."""
    if isinstance(request, InputFactor | GradientFactor):
        return 4 * width * min(request.rank, width)
    return 4 * width**2


def packed(truncated: Truncated) -> Tensor:
    """Packs a factor and its error into ``(k + 1, n + 2)``: rows ``[λ_i, 0, u_i]``, the last one ``[ρ, error, 0]``.

    Law: ``unpacked(packed(x))`` is x.
    """
    factor = truncated.factor
    table = factor.U.new_zeros(factor.rank + 1, factor.size + 2)
    table[:-1, 0], table[:-1, 2:] = factor.values, factor.U.T
    table[-1, 0], table[-1, 1] = factor.remainder, truncated.error
    return table


def unpacked(table: Tensor) -> Truncated:
    """Returns the factor and its error from what :func:`packed` returned, ``(k + 1, n + 2)``."""
    factor = LowRankPlus(table[:-1, 2:].T.contiguous(), table[:-1, 0].contiguous(), table[-1, 0].clone())
    return Truncated(factor, float(table[-1, 1]))
