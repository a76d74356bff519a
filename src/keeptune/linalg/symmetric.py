"""Symmetric factors F, n x n, that penalties multiply with: identity, dense, or low rank plus a scalar."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Dense", "PsdMatrix", "Identity", "LowRankPlus", "psd_matrix_from"]


class PsdMatrix(Protocol):
    """A symmetric positive semi-definite matrix F, ``(n, n)``, known by what it does.

    Laws, for every kind: ``apply(X) == dense() @ X``; ``trace() == dense().trace()``; ``dense()`` is symmetric and
    positive semi-definite; ``damped(rho).dense() == (1 - rho) dense() + rho trace() / n I``, which keeps the trace;
    ``psd_matrix_from(tensors(prefix), prefix)`` is the same factor.
    """

    @property
    def size(self) -> int:
        """The number of rows n."""
        ...

    def apply(self, X: Tensor) -> Tensor:
        """Multiply.

        Args:
            X: ``(n, k)``.

        Returns:
            ``F X``, ``(n, k)``.
        """
        ...

    def trace(self) -> Tensor:
        """Sum the diagonal.

        Returns:
            A scalar.
        """
        ...

    def dense(self) -> Tensor:
        """Form the matrix.

        Returns:
            ``(n, n)``.
        """
        ...

    def damped(self, rho: float) -> PsdMatrix:
        """Mix with the identity of the same trace.

        Args:
            rho: Between 0 (nothing changes) and 1 (only the trace is left).

        Returns:
            ``(1 - rho) F + rho tr(F) / n I``.

        Raises:
            ValueError: rho is not between 0 and 1.
        """
        ...

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> PsdMatrix:
        """Convert.

        Args:
            dtype: The wanted dtype.
            device: The wanted device; None keeps it.

        Returns:
            The same factor there.
        """
        ...

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Give what a file needs to hold.

        Args:
            prefix: Stands before each name.

        Returns:
            Tensors by name, for :func:`psd_matrix_from`.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Identity:
    """``scale I``.

    Args:
        size: n.
        scale: A scalar, not negative.
    """

    size: int
    scale: Tensor

    def apply(self, X: Tensor) -> Tensor:
        """Multiply: ``scale X``."""
        return X * self.scale

    def trace(self) -> Tensor:
        """Sum the diagonal: ``n scale``."""
        return self.scale * self.size

    def dense(self) -> Tensor:
        """Form the matrix, ``(n, n)``."""
        return torch.eye(self.size, dtype=self.scale.dtype, device=self.scale.device) * self.scale

    def damped(self, rho: float) -> Identity:
        """Mix with the identity of the same trace: nothing changes."""
        _check(rho)
        return self

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> Identity:
        """Convert."""
        return Identity(self.size, self.scale.to(device=device, dtype=dtype))

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Give ``scale`` and ``size``."""
        return {f"{prefix}scale": self.scale, f"{prefix}size": torch.tensor(self.size)}


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """A matrix as it is.

    Args:
        matrix: ``(n, n)``, symmetric positive semi-definite.
    """

    matrix: Tensor

    @property
    def size(self) -> int:
        """The number of rows n."""
        return self.matrix.shape[0]

    def apply(self, X: Tensor) -> Tensor:
        """Multiply: ``matrix X``."""
        return self.matrix @ X

    def trace(self) -> Tensor:
        """Sum the diagonal."""
        return self.matrix.trace()

    def dense(self) -> Tensor:
        """Give the matrix, ``(n, n)``."""
        return self.matrix

    def damped(self, rho: float) -> Dense:
        """Mix with the identity of the same trace."""
        _check(rho)
        matrix = self.matrix * (1 - rho)
        matrix.diagonal().add_(rho * self.trace() / self.size)
        return Dense(matrix)

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> Dense:
        """Convert."""
        return Dense(self.matrix.to(device=device, dtype=dtype))

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Give ``matrix``."""
        return {f"{prefix}matrix": self.matrix}


@dataclass(frozen=True, slots=True, eq=False)
class LowRankPlus:
    """``U diag(values) Uᵀ + remainder (I - U Uᵀ)``: some directions as they are, one value for all others.

    With the top eigenvectors and the mean of the other eigenvalues it is the nearest matrix of this form in
    Frobenius norm, and it has the trace of the original.

    Args:
        U: ``(n, k)``, orthonormal columns.
        values: ``(k,)``, not negative.
        remainder: A scalar, not negative.
    """

    U: Tensor
    values: Tensor
    remainder: Tensor

    @property
    def size(self) -> int:
        """The number of rows n."""
        return self.U.shape[0]

    @property
    def rank(self) -> int:
        """The number of directions k."""
        return self.U.shape[1]

    def share(self) -> Tensor:
        """Say how much of the trace the k directions hold.

        Returns:
            A scalar between 0 and 1; 1 for a zero matrix.
        """
        trace = self.trace()
        return torch.where(trace > 0, self.values.sum() / trace, torch.ones_like(trace))

    def apply(self, X: Tensor) -> Tensor:
        """Multiply through the k directions, never forming n x n."""
        return torch.addmm(X * self.remainder, self.U, (self.values - self.remainder)[:, None] * (self.U.T @ X))

    def trace(self) -> Tensor:
        """Sum the eigenvalues."""
        return self.values.sum() + self.remainder * (self.size - self.rank)

    def dense(self) -> Tensor:
        """Form the matrix, ``(n, n)``."""
        matrix = (self.U * (self.values - self.remainder)) @ self.U.T
        matrix.diagonal().add_(self.remainder)
        return matrix

    def damped(self, rho: float) -> LowRankPlus:
        """Mix with the identity of the same trace: every eigenvalue moves towards the mean of all."""
        _check(rho)
        mean = self.trace() / self.size
        return LowRankPlus(self.U, (1 - rho) * self.values + rho * mean, (1 - rho) * self.remainder + rho * mean)

    def to(self, dtype: torch.dtype, device: torch.device | str | None = None) -> LowRankPlus:
        """Convert."""
        parts = (self.U, self.values, self.remainder)
        return LowRankPlus(*(part.to(device=device, dtype=dtype) for part in parts))

    def tensors(self, prefix: str = "") -> dict[str, Tensor]:
        """Give ``U``, ``values`` and ``remainder``."""
        return {f"{prefix}U": self.U, f"{prefix}values": self.values, f"{prefix}remainder": self.remainder}


def psd_matrix_from(tensors: Mapping[str, Tensor], prefix: str = "") -> PsdMatrix:
    """Read a factor back.

    Args:
        tensors: Tensors by name, others among them.
        prefix: What stands before the names of this factor.

    Returns:
        The factor.

    Raises:
        KeyError: No factor of that prefix is among them.
    """
    if f"{prefix}matrix" in tensors:
        return Dense(tensors[f"{prefix}matrix"])
    if f"{prefix}U" in tensors:
        return LowRankPlus(tensors[f"{prefix}U"], tensors[f"{prefix}values"], tensors[f"{prefix}remainder"])
    if f"{prefix}scale" in tensors:
        return Identity(int(tensors[f"{prefix}size"]), tensors[f"{prefix}scale"])
    raise KeyError(f"no factor named {prefix!r} among {sorted(tensors)}")


def _check(rho: float) -> None:
    if not 0 <= rho <= 1:
        raise ValueError(f"damped: got rho = {rho}, wanted 0 <= rho <= 1")
