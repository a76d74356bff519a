"""Symmetric positive semi-definite matrices that penalties multiply with: dense ones, or a multiple of the identity."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Identity:
    """``scale I`` of size n, with a scalar tensor that is not negative; ``Identity(n, scale) @ X`` is ``scale X``."""

    size: int
    scale: Tensor

    def __matmul__(self, X: Tensor) -> Tensor:
        return X * self.scale


# F, (n, n), known by what ``F @ X`` is.
PsdMatrix = Tensor | Identity


def damped(F: Tensor, rho: float) -> Tensor:
    """Returns ``(1 - rho) F + rho tr(F) / n I``, ``(n, n)``: F itself at 0, only its trace at 1, else a ValueError.

    Law: the trace is that of F, which stays as it is.
    """
    if not 0 <= rho <= 1:
        raise ValueError(f"damped: got rho = {rho}, wanted 0 <= rho <= 1")
    mixed = F * (1 - rho)
    mixed.diagonal().add_(rho * F.trace() / len(F))
    return mixed
