"""Timing of rivals in one run: they take turns, and the medians are compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

__all__ = ["compare"]


def compare(rivals: Mapping[str, Callable[[], object]], *, rounds: int) -> dict[str, float]:
    """Time functions in turns, so that a noisy neighbour hits all of them alike.

    Args:
        rivals: Name to function.
        rounds: How often each is timed, after one untimed call.

    Returns:
        Name to median seconds.
    """
    for function in rivals.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, function in rivals.items():
            start = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in seconds.items()}
