"""Symmetric positive semi-definite matrices that penalties multiply with: identity, dense, low rank plus a scalar."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


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
class LowRankPlus(PsdMatrix):
    """``U diag(values) Uᵀ + remainder (I - U Uᵀ)``: some directions as they are, one value for all others.

    With the top eigenvectors and the mean of the other eigenvalues it is the nearest matrix of this form in
    Frobenius norm, and it has the trace of the original. U ``(n, k)`` has orthonormal columns; values ``(k,)`` and the
    remainder are not negative.
    """

    U: Tensor
    values: Tensor
    remainder: Tensor

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
        return torch.where(trace > 0, self.values.sum() / trace, torch.ones_like(trace))

    def apply(self, X: Tensor) -> Tensor:
        """Returns ``F X`` through the k directions, without an n x n matrix."""
        return torch.addmm(X * self.remainder, self.U, (self.values - self.remainder)[:, None] * (self.U.T @ X))

    def trace(self) -> Tensor:
        """Returns the sum of the eigenvalues."""
        return self.values.sum() + self.remainder * (self.size - self.rank)

    def dense(self) -> Tensor:
        """Returns the matrix."""
        matrix = (self.U * (self.values - self.remainder)) @ self.U.T
        matrix.diagonal().add_(self.remainder)
        return matrix

    def _mixed(self, rho: float) -> LowRankPlus:
        mean = self.trace() / self.size
        return LowRankPlus(self.U, (1 - rho) * self.values + rho * mean, (1 - rho) * self.remainder + rho * mean)


def psd_matrix_from(tensors: Mapping[str, Tensor], prefix: str = "") -> PsdMatrix:
    """Reads the matrix whose names begin with a prefix, among other tensors; a KeyError says that there is none."""
    if f"{prefix}matrix" in tensors:
        return Dense(tensors[f"{prefix}matrix"])
    if f"{prefix}U" in tensors:
        return LowRankPlus(tensors[f"{prefix}U"], tensors[f"{prefix}values"], tensors[f"{prefix}remainder"])
    if f"{prefix}scale" in tensors:
        return Identity(int(tensors[f"{prefix}size"]), tensors[f"{prefix}scale"])
    raise KeyError(f"no matrix named {prefix!r} among {sorted(tensors)}")
