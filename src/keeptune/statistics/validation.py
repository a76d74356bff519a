"""What every statistic refuses: no tokens, and rows that are not numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from keeptune.core.errors import StatisticsError

__all__ = ["UnseenError", "finite", "need_tokens"]


class UnseenError(StatisticsError):
    """No token of the data reached a module."""


def need_tokens(tokens: int, module: str) -> None:
    """Check that a sum has seen something.

    Args:
        tokens: How many tokens were added.
        module: The module's name.

    Raises:
        UnseenError: None was.
    """
    if tokens == 0:
        raise UnseenError(
            module,
            got="no tokens",
            wanted="at least one unpadded token",
            next_step="The data never reached this module; leave it out of the targets.",
        )


def finite(value: Tensor, module: str) -> Tensor:
    """Check that a statistic is made of numbers.

    Args:
        value: The statistic.
        module: The module's name.

    Returns:
        The same.

    Raises:
        StatisticsError: It is NaN or infinite somewhere.
    """
    if not bool(torch.isfinite(value).all()):
        raise StatisticsError(
            module,
            got="NaN or infinite activations or gradients",
            wanted="finite ones",
            next_step="Load the model in float32 or bfloat16 and check the weights of the modules before it.",
        )
    return value
