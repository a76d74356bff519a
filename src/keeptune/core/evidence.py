"""The evidence of a plan as reports hold it: a bounded number of points of each curve, whatever the model's width."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, Final

import torch
from torch import Tensor

WHOLE: Final = 256  # numbers of a curve that is not thinned
POINTS: Final = 128  # of one that is; a multiple of the 64 ranges of nodes that a page's votes are drawn in
_FIRST, _LAST = 48, 16  # kept one by one; the others are evenly spaced


def bounded(evidence: Mapping[str, Tensor]) -> dict[str, Any]:
    """Returns the curves of a target, name to 1-D tensor, as plain values.

    Of up to 256 numbers a list. Of a longer curve that is sorted, 128 points: ``size`` its length, ``at`` their places,
    ``values`` the numbers there; numbers that a short curve names too (the part of a spectrum that a method takes) are
    among them. Of one that is not sorted the means over 128 ranges: ``at`` where they begin, ``means``.
    """
    named = [values for values in evidence.values() if values.numel() <= WHOLE]
    taken = torch.cat(named) if named else torch.empty(0)
    return {name: _bounded(values.detach().cpu(), taken) for name, values in evidence.items()}


def _bounded(values: Tensor, taken: Tensor) -> list[float] | dict[str, Any]:
    size = values.numel()
    if size <= WHOLE:
        numbers: list[float] = values.tolist()
        return numbers
    steps = values.diff()
    if bool((steps <= 0).all()) or bool((steps >= 0).all()):
        between = torch.linspace(_FIRST, size - _LAST, POINTS - _FIRST - _LAST, dtype=torch.float64).round().long()
        own = torch.isin(values, taken.to(values)).nonzero().flatten()
        ends = [*range(_FIRST), *range(size - _LAST, size)]
        at = sorted({*ends, *between.tolist(), *own.tolist()})
        return {"size": size, "at": at, "values": [float(f"{value:.9g}") for value in values[at].tolist()]}
    edges = torch.linspace(0, size, POINTS + 1, dtype=torch.float64).round().long().tolist()
    means = [float(values[start:stop].double().mean()) for start, stop in pairwise(edges)]
    return {"size": size, "at": edges[:-1], "means": means}
