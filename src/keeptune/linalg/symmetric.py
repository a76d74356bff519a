"""Symmetric positive semi-definite matrices that penalties multiply with: dense ones, or a multiple of the identity."""

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
