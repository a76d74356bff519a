"""LowRank: a weight change B A, and its algebra."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """A weight change ``B A``, of B ``(m, r)`` and A ``(r, n)``; other shapes raise ValueError.

    Laws: ``x.minus(y).dense() == x.dense() - y.dense()``; ``x.plus(y).dense() == x.dense() + y.dense()``;
    ``x.scaled(s).dense() == s * x.dense()``; ``x.padded(r).dense() == x.dense()``;
    ``x.norm_squared() == (x.dense() ** 2).sum()``;
    ``x.truncated(r)`` is the nearest matrix of rank r (Eckart-Young).
    """

    B: Tensor
    A: Tensor

    def __post_init__(self) -> None:
        if self.B.ndim != 2 or self.A.ndim != 2 or self.B.shape[1] != self.A.shape[0]:
            raise ValueError(f"LowRank: B {tuple(self.B.shape)} and A {tuple(self.A.shape)} do not fit")

    @classmethod
    def from_triplets(cls, U: Tensor, S: Tensor, Vh: Tensor) -> LowRank:
        """Returns balanced factors of singular triplets, float32: ``B = U sqrt(S)``, ``A = sqrt(S) Vᵀ``.

        Laws for orthonormal U ``(m, r)`` and V, S ``(r,)``: ``B A == U diag(S) Vᵀ``; ``BᵀB == A Aᵀ == diag(S)``.
        """
        root = S.sqrt()
        return cls(B=(U * root).float(), A=(root[:, None] * Vh).float())

    @property
    def rank(self) -> int:
        """The number of columns of B; the rank as a matrix may be lower."""
        return self.B.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        """The shape ``(m, n)`` of the product."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def is_zero(self) -> bool:
        """Whether one of the factors is zero, as at the start of plain LoRA."""
        return not (bool(self.B.any()) and bool(self.A.any()))

    def dense(self) -> Tensor:
        """Returns the product ``B A``, ``(m, n)``."""
        return self.B @ self.A

    def scaled(self, factor: float) -> LowRank:
        """Returns ``(factor B) A``."""
        return LowRank(self.B * factor, self.A)

    def minus(self, other: LowRank) -> LowRank:
        """Returns the exact difference, of rank r + r', or r where the two share A (a frozen A) or B."""
        if self.shape != other.shape:
            raise ValueError(f"LowRank.minus: shapes {self.shape} and {other.shape} differ")
        if torch.equal(self.A, other.A):
            return LowRank(self.B - other.B, self.A)
        if torch.equal(self.B, other.B):
            return LowRank(self.B, self.A - other.A)
        return LowRank(torch.cat([self.B, -other.B], dim=1), torch.cat([self.A, other.A], dim=0))

    def plus(self, other: LowRank) -> LowRank:
        """Returns the exact sum, of rank r + r', or r where the two share A or B."""
        return self.minus(other.scaled(-1.0))

    def padded(self, rank: int) -> LowRank:
        """Returns the same change of a larger rank, with zero columns appended to B and zero rows to A."""
        extra = rank - self.rank
        if extra < 0:
            raise ValueError(f"LowRank.padded: rank {self.rank} cannot shrink to {rank}; use truncated")
        B = torch.cat([self.B, self.B.new_zeros(self.B.shape[0], extra)], dim=1)
        A = torch.cat([self.A, self.A.new_zeros(extra, self.A.shape[1])], dim=0)
        return LowRank(B, A)

    def truncated(self, rank: int) -> LowRank:
        """Returns the nearest change of at most a rank, balanced, by QR of the factors and an r x r SVD."""
        Q_B, R_B = torch.linalg.qr(self.B.double())
        Q_A, R_A = torch.linalg.qr(self.A.double().T)
        U, S, Vh = torch.linalg.svd(R_B @ R_A.T)
        k = min(rank, S.shape[0])
        root = S[:k].sqrt()
        B = Q_B @ (U[:, :k] * root)
        A = (root[:, None] * Vh[:k]) @ Q_A.T
        return LowRank(B.to(self.B.dtype), A.to(self.A.dtype))

    def norm_squared(self) -> Tensor:
        """Returns ``‖B A‖² = sum((BᵀB) ∘ (AAᵀ))``, a scalar, without the m x n product."""
        return ((self.B.T @ self.B) * (self.A @ self.A.T)).sum()

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> LowRank:
        """Returns both factors converted; a device of None keeps theirs."""
        return LowRank(self.B.to(device=device, dtype=dtype), self.A.to(device=device, dtype=dtype))


class RowSelection(LowRank):
    """``B = I[:, S]`` and ``A = 0``: row j of A, once trained, is added to row S_j. Only S is held.

    B and A are made whenever they are read; A takes no memory.

    Args:
        rows: S, ascending.
        shape: The shape ``(m, n)`` of the product.
    """

    __slots__ = ("_shape", "rows")

    rows: tuple[int, ...]
    _shape: tuple[int, int]

    def __init__(self, rows: Sequence[int], shape: tuple[int, int]) -> None:
        object.__setattr__(self, "rows", tuple(rows))
        object.__setattr__(self, "_shape", shape)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.rows, self._shape)

    @property
    def B(self) -> Tensor:  # noqa: N802
        """The columns of the identity that S names, ``(m, r)``."""
        B = torch.zeros(self._shape[0], self.rank)
        B[list(self.rows), range(self.rank)] = 1.0
        return B

    @property
    def A(self) -> Tensor:  # noqa: N802
        """Zeros, ``(r, n)``."""
        return torch.zeros(()).expand(self.rank, self._shape[1])

    @property
    def rank(self) -> int:
        """The number of rows."""
        return len(self.rows)

    @property
    def shape(self) -> tuple[int, int]:
        """The shape ``(m, n)`` of the product."""
        return self._shape

    @property
    def is_zero(self) -> bool:
        """True."""
        return True
