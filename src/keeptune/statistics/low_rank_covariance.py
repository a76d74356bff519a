"""Covariances kept as their top k directions and a diagonal: no n x n matrix, neither in memory nor on disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from keeptune.core.target import Target
from keeptune.linalg.streaming_eigen import TopDirections, Truncated, sum_size
from keeptune.linalg.symmetric import Dense, LowRankDiagonal, PsdMatrix
from keeptune.model.summed_loss import Labels
from keeptune.statistics.covariance import GradientCovariance, InputCovariance
from keeptune.statistics.request import DataRole, GradientRequest, RowRequest, WeightReader
from keeptune.statistics.running_mean import Accumulator


class _Factor:
    """What both factors are; ``side`` is that of a target's weight."""

    __slots__ = ()
    version: ClassVar[int] = 2
    ordered: ClassVar[bool] = True
    side: ClassVar[str]
    rank: int
    seed: int

    def numbers(self, target: Target) -> int:
        """Returns about ``1.1 k n``: a float32 counts half."""
        return sum_size(self.rank, getattr(target, self.side))

    def kept(self, target: Target) -> int:
        """Returns the bytes of ``(k + 1, n + 1)``."""
        n: int = getattr(target, self.side)
        return 4 * (min(self.rank, n) + 1) * (n + 1)

    def accumulator(self, target: Target, device: torch.device, weight: WeightReader) -> _TopSum:
        """Returns an empty buffer."""
        return _TopSum(getattr(target, self.side), self.rank, device, self.seed)


@dataclass(frozen=True, slots=True)
class InputFactor(_Factor, RowRequest):
    """``Ω = E[h hᵀ]`` as its top directions and a diagonal, ``(k + 1, n + 1)``; read it with :func:`read_factor`.

    The seed is that of the search for directions and of the error's estimate.
    """

    side: ClassVar[str] = "in_features"

    rank: int
    seed: int = 0


@dataclass(frozen=True, slots=True)
class GradientFactor(_Factor, GradientRequest):
    """``Γ = E[δ δᵀ]`` as its top directions and a diagonal, ``(k + 1, m + 1)``; read it with :func:`read_factor`.

    The seed is that of the draws, of the search and of the error's estimate.
    """

    side: ClassVar[str] = "out_features"

    rank: int


FactorRank = int | Literal["auto"] | None  # what an option may say, :func:`chosen_rank`
DENSE_WIDTH, INPUT_RANK, GRADIENT_RANK = 1024, 288, 64  # of "auto"; why: docs/results/factors.md
Covariance = InputCovariance | GradientCovariance | InputFactor | GradientFactor


class _TopSum(TopDirections, Accumulator):
    """The top directions of rows as an accumulator."""

    @property
    def sums(self) -> list[Tensor]:
        """What rows change."""
        return [self.squares, self.probed, self.buffer]

    def result(self) -> Tensor:
        """Returns ``(k + 1, n + 1)``; the squares where they are not finite: no eigenvectors exist then."""
        if not bool(self.squares.isfinite().all()):
            return self.squares.cpu()
        return packed(self.truncated()).float().cpu()


def chosen_rank(asked: FactorRank, width: int, auto: int) -> int | None:
    """Returns how many directions of a covariance are kept: all (None), those asked for, or by its width.

    Args:
        asked: An option; ``"auto"`` keeps the covariance whole up to a width of 1,024.
        width: n.
        auto: How many directions of a wider one are kept.
    """
    if asked == "auto":
        return None if width <= DENSE_WIDTH else auto
    return asked


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
    """Returns the bytes of a covariance of a width in training: directions in bfloat16, all else in float32."""
    if isinstance(request, InputFactor | GradientFactor):
        rank = min(request.rank, width)
        return 2 * width * rank + 4 * (width + rank)
    return 4 * width**2


def packed(truncated: Truncated) -> Tensor:
    """Packs a factor and its error into ``(k + 1, n + 1)``: rows ``[λ_i, u_i]``, the last one ``[error, d]``.

    Law: ``unpacked(packed(x))`` is x.
    """
    factor = truncated.factor
    directions = torch.cat([factor.values[:, None], factor.U.T], dim=1)
    return torch.cat([directions, torch.cat([factor.rest.new_tensor([truncated.error]), factor.rest])[None]])


def unpacked(table: Tensor) -> Truncated:
    """Returns the factor and its error from what :func:`packed` returned, ``(k + 1, n + 1)``."""
    factor = LowRankDiagonal(table[:-1, 1:].T.contiguous(), table[:-1, 0].contiguous(), table[-1, 1:].clone())
    return Truncated(factor, float(table[-1, 0]))
