"""The top eigenvectors of X^T X / N from rows X that pass by once, without an n x n matrix.

Rows fill a buffer S of 2c rows, c = k + max(k / 8, 8); when it is full it is compressed to c rows ``S' = Qᵀ S``, with Q
a basis of the largest left singular vectors of S, found by two steps of subspace iteration on S Sᵀ. Then

    S'ᵀ S' ≼ Sᵀ S                      whatever Q: nothing is counted twice             (1)
    F̂ = U diag(λ) Uᵀ + diag(d)         λ, U: top k of SᵀS / N at the end                (2)
    d = diag(F - U diag(λ) Uᵀ) >= 0    diag F is summed exactly, so F̂ has it, and tr F  (3)
    ‖F - F̂‖ ≈ ‖(F - F̂) G‖ / sqrt(p)   G (n, p) random signs, F G is summed exactly       (4)

The buffer is filled to the same size however rows are split over calls: the result depends on their order only, and
on that no more than (4) says. With k = n it is X^T X / N itself. A buffer four times as large (2k of 9k rows kept)
lowers the error (4) by 1 to 3%, and takes longer (docs/results/factors.md).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from keeptune.linalg.decompositions import canonical_signs
from keeptune.linalg.gram import add_gram, symmetric
from keeptune.linalg.symmetric import LowRankDiagonal

_MORE, _LEAST = 8, 8  # k + max(k / 8, 8) rows survive a compression
_STEPS = 2
_PROBES = 16
_SHIFT = 1e-13  # of the trace: what float64 rounds away


@dataclass(frozen=True, slots=True, eq=False)
class Truncated:
    """A covariance as its top directions and the diagonal of all others, F̂.

    ``error`` is ``‖F - F̂‖ / ‖F‖`` in Frobenius norm, estimated from 16 probes.
    """

    factor: LowRankDiagonal
    error: float


@dataclass
class TopDirections:
    """The top k eigenvectors (or n, if there are fewer) of an n x n covariance whose rows stream by.

    Laws: the result does not depend on how rows are split over ``add`` calls; ``F̂ - diag(d) ≼ F``; the diagonal is
    that of F; with k = n it is F. The seed is that of the subspace iteration's start and of the probes.
    """

    features: int
    rank: int
    device: torch.device
    seed: int = 0
    tokens: int = 0
    squares: Tensor = field(init=False)
    probed: Tensor = field(init=False)
    probes: Tensor = field(init=False)
    buffer: Tensor = field(init=False)
    start: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.rank = min(self.rank, self.features)
        draw = torch.Generator().manual_seed(self.seed)
        signs = torch.randint(0, 2, (self.features, _PROBES), generator=draw) * 2 - 1
        self.probes = signs.to(self.device, torch.int8)
        self.probed = torch.zeros(self.features, _PROBES, dtype=torch.float64, device=self.device)
        self.squares = torch.zeros(self.features, dtype=torch.float64, device=self.device)
        rows = _buffer_rows(self.rank, self.features)
        self.buffer = torch.zeros(rows, self.features, dtype=torch.float32, device=self.device)
        shape = (rows, rows // 2)
        self.start = torch.randn(shape, generator=draw, dtype=torch.float32).to(self.device)

    def add(self, rows: Tensor) -> None:
        """Adds the rows of one batch, ``(tokens, n)``."""
        X = rows.to(self.device, torch.float32)
        self.squares += X.square().sum(0, dtype=torch.float64)
        self.probed += X.T @ (X @ self.probes.float())
        rows_held, kept = self.start.shape
        while X.shape[0]:
            filled = self.filled
            part, X = X[: rows_held - filled], X[rows_held - filled :]
            self.buffer[filled : filled + part.shape[0]] = part
            self.tokens += part.shape[0]
            if filled + part.shape[0] == rows_held:
                self.buffer[:kept] = self._compressed(self.buffer)

    @property
    def filled(self) -> int:
        """How many rows the buffer has: as many as were added, then the kept ones and those after a compression."""
        rows_held, kept = self.start.shape
        return self.tokens if self.tokens < rows_held else kept + self.tokens % kept

    def truncated(self) -> Truncated:
        """Returns the top directions, on the buffer's device, float64."""
        S = self.buffer[: self.filled]
        S = (self._compressed(S) if len(S) > self.start.shape[1] else S).double()
        if len(S) < self.rank:  # fewer tokens than directions: the others have the value 0
            S = torch.cat([S, S.new_zeros(self.rank - len(S), self.features)])
        squares, W = torch.linalg.eigh(S @ S.T)
        values = squares.flip(0)[: self.rank].clamp_min(0) / self.tokens
        U = _orthonormal(S.T @ W.flip(1)[:, : self.rank])
        rest = (self.squares / self.tokens - U.square() @ values).clamp_min(0)
        factor = LowRankDiagonal(canonical_signs(U), values, rest)
        probes, probed = self.probes.double(), self.probed / self.tokens
        error = (probed - factor.apply(probes)).norm() / probed.norm().clamp_min(math.ulp(0.0))  # (4)
        return Truncated(factor, float(error))

    def _compressed(self, S: Tensor) -> Tensor:
        """Return ``Qᵀ S`` (1)."""
        upper = torch.zeros(len(S), len(S), dtype=torch.float64, device=self.device)
        add_gram(upper, S.T)
        gram = symmetric(upper).float()
        Q = self.start[: len(S)]
        for _ in range(_STEPS):
            Q = _contraction(gram @ Q)
        return Q.T @ S


def sum_size(rank: int, features: int) -> int:
    """Returns how many numbers in float64 :class:`TopDirections` holds; a float32 counts half."""
    rows = _buffer_rows(rank, features)
    return (rows * features + rows * rows // 2) // 2 + features * (_PROBES + _PROBES // 8 + 1)


def _buffer_rows(rank: int, features: int) -> int:
    return 2 * min(rank + max(rank // _MORE, _LEAST), features)


def _orthonormal(Y: Tensor) -> Tensor:
    """Orthonormalise columns that are orthogonal but for rounding, in their order; a zero column becomes any other."""
    norms = torch.linalg.vector_norm(Y, dim=0)
    Q: Tensor = torch.linalg.qr(Y / norms.clamp_min(torch.finfo(Y.dtype).tiny))[0]
    return Q


def _contraction(Y: Tensor) -> Tensor:
    """Orthonormalise columns by Cholesky; where they depend on each other, shorten them: ``QᵀQ ≼ I`` always."""
    Y = Y.double()
    gram = Y.T @ Y
    gram.diagonal().add_(gram.trace() * _SHIFT + torch.finfo(gram.dtype).tiny)
    # cholesky_ex raises nothing: NaN rows are reported by the runner, with the module and the batch.
    root = torch.linalg.cholesky_ex(gram)[0]
    Q: Tensor = torch.linalg.solve_triangular(root.T, Y, upper=True, left=False)
    return Q.float()
