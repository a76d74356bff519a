"""Symmetric positive semi-definite matrices that penalties multiply with: identity, dense, low rank plus a diagonal."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

_BFLOAT16 = 2**-7  # twice what rounding to bfloat16 changes, relatively


class PsdMatrix(ABC):
    """A symmetric positive semi-definite matrix F, ``(n, n)``, of size n, known by what it does.

    Laws, for every kind: ``apply(X) == dense() @ X``; ``trace() == dense().trace()``; ``dense()`` is symmetric and
    positive semi-definite; ``damped(rho).dense() == (1 - rho) dense() + rho trace() / n I``, which keeps the trace;
    ``psd_matrix_from(tensors(prefix), prefix)`` is the same matrix.
    """

    __slots__ = ()

    size: int

    @abstractmethod
    def apply(self, X: Tensor) -> Tensor:
        """Returns ``F X``, ``(n, k)``."""

    @abstractmethod
    def trace(self) -> Tensor:
        """Returns the trace, a scalar."""

    @abstractmethod
    def dense(self) -> Tensor:
        """Returns the matrix, ``(n, n)``."""

    @abstractmethod
    def _mixed(self, rho: float) -> Self: ...

    def damped(self, rho: float) -> Self:
        """Returns ``(1 - rho) F + rho tr(F) / n I``: F itself at 0, only its trace at 1, else a ValueError."""
        if not 0 <= rho <= 1:
            raise ValueError(f"damped: got rho = {rho}, wanted 0 <= rho <= 1")
        return self._mixed(rho)

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> Self:
        """Returns the same matrix converted; a device of None keeps its own."""
        parts = self._parts().items()
        moved = {name: p.to(device=device, dtype=dtype) if isinstance(p, Tensor) else p for name, p in parts}
        return type(self)(**moved)

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Returns the tensors to save, for :func:`psd_matrix_from`."""
        parts = self._parts().items()
        return {f"{prefix}{name}": p if isinstance(p, Tensor) else torch.tensor(p) for name, p in parts}

    def _parts(self) -> dict[str, Tensor | int]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}  # type: ignore[arg-type]


@dataclass(frozen=True, eq=False)
class Identity(PsdMatrix):
    """``scale I`` of size n, with a scalar tensor that is not negative."""

    size: int
    scale: Tensor

    def apply(self, X: Tensor) -> Tensor:
        """Returns ``scale X``."""
        return X * self.scale

    def trace(self) -> Tensor:
        """Returns ``n scale``."""
        return self.scale * self.size

    def dense(self) -> Tensor:
        """Returns the matrix."""
        return torch.eye(self.size, dtype=self.scale.dtype, device=self.scale.device) * self.scale

    def _mixed(self, rho: float) -> Identity:
        return self


@dataclass(frozen=True, eq=False)
class Dense(PsdMatrix):
    """A matrix as it is, ``(n, n)``, symmetric positive semi-definite."""

    matrix: Tensor

    @property
    def size(self) -> int:  # type: ignore[override]
        """The number of rows n."""
        return self.matrix.shape[0]

    def apply(self, X: Tensor) -> Tensor:
        """Returns ``matrix X``."""
        return self.matrix @ X

    def trace(self) -> Tensor:
        """Returns the trace."""
        return self.matrix.trace()

    def dense(self) -> Tensor:
        """Returns the matrix."""
        return self.matrix

    def _mixed(self, rho: float) -> Dense:
        matrix = self.matrix * (1 - rho)
        matrix.diagonal().add_(rho * self.trace() / self.size)
        return Dense(matrix)


@dataclass(frozen=True, eq=False)
class LowRankDiagonal(PsdMatrix):
    """``U diag(values) Uᵀ + diag(rest)``: some directions as they are, of all others the diagonal.

    With the top eigenpairs of a matrix and what they leave of its diagonal it has the diagonal of that matrix, and its
    trace. U ``(n, k)`` may have its own dtype (:meth:`halved`); values ``(k,)`` and rest ``(n,)`` are not negative.
    """

    U: Tensor
    values: Tensor
    rest: Tensor

    @property
    def size(self) -> int:  # type: ignore[override]
        """The number of rows n."""
        return self.U.shape[0]

    @property
    def rank(self) -> int:
        """The number of directions k."""
        return self.U.shape[1]

    def share(self) -> Tensor:
        """Returns the share of the trace in the k directions, a scalar; 1 for a zero matrix."""
        trace = self.trace()
        return torch.where(trace > 0, 1 - self.rest.sum() / trace, torch.ones_like(trace))

    def apply(self, X: Tensor) -> Tensor:
        """Returns ``F X`` through the k directions, without an n x n matrix."""
        U = self.U.to(X.dtype)
        return torch.addmm(self.rest[:, None] * X, U, self.values[:, None] * (U.T @ X))

    def trace(self) -> Tensor:
        """Returns the sum of the diagonal."""
        return self._diagonal().sum()

    def dense(self) -> Tensor:
        """Returns the matrix."""
        U = self.U.to(self.values.dtype)
        matrix = (U * self.values) @ U.T
        matrix.diagonal().add_(self.rest)
        return matrix

    def halved(self) -> LowRankDiagonal:
        """Returns the matrix with U in bfloat16: half the memory, the same diagonal.

        What rounding takes from a diagonal entry goes to the rest. Where it adds more than the rest has, the row of U
        is shortened first: both leave the matrix positive semi-definite.
        """
        diagonal = self._diagonal()
        rounded = LowRankDiagonal(self.U.bfloat16(), self.values, torch.zeros_like(self.rest))
        over = rounded._diagonal() > diagonal
        U = torch.where(over[:, None], (self.U * (1 - _BFLOAT16)).bfloat16(), rounded.U)
        rounded = LowRankDiagonal(U, self.values, torch.zeros_like(self.rest))
        return LowRankDiagonal(U, self.values, (diagonal - rounded._diagonal()).clamp_min(0))

    def _diagonal(self) -> Tensor:
        return self.U.to(self.values.dtype).square() @ self.values + self.rest

    def _mixed(self, rho: float) -> LowRankDiagonal:
        mean = self.trace() / self.size
        return LowRankDiagonal(self.U, (1 - rho) * self.values, (1 - rho) * self.rest + rho * mean)


def psd_matrix_from(tensors: Mapping[str, Tensor], prefix: str = "") -> PsdMatrix:
    """Reads the matrix whose names begin with a prefix, among other tensors; a KeyError says that there is none."""
    if f"{prefix}matrix" in tensors:
        return Dense(tensors[f"{prefix}matrix"])
    if f"{prefix}U" in tensors:
        U, values = tensors[f"{prefix}U"], tensors[f"{prefix}values"]
        if f"{prefix}remainder" in tensors:  # one number for what is orthogonal to U: plans of before the diagonal
            rest = tensors[f"{prefix}remainder"]
            return LowRankDiagonal(U, (values - rest).clamp_min(0), rest.expand(len(U)).clone())
        return LowRankDiagonal(U, values, tensors[f"{prefix}rest"])
    if f"{prefix}scale" in tensors:
        return Identity(int(tensors[f"{prefix}size"]), tensors[f"{prefix}scale"])
    raise KeyError(f"no matrix named {prefix!r} among {sorted(tensors)}")
