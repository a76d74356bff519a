"""LoKI's selection written down as the paper has it (eqs. 6-9): one sample, one layer, one node at a time."""

from __future__ import annotations

from decimal import ROUND_FLOOR, Decimal

from torch import Tensor


def quota(q: str, nodes: int) -> int:
    """Eq. 6 on the decimal number as it is written."""
    return int((Decimal(q) * nodes / 100).to_integral_value(ROUND_FLOOR))


def normalised(scores: list[float]) -> list[float]:
    """Min-max; scores that are all equal stay so."""
    low, high = min(scores), max(scores)
    return [(x - low) / (high - low) if high > low else 0.0 for x in scores]


def selected(attributions: Tensor, q: str, selection: str) -> list[list[int]]:
    """The rows of each layer, of ``(N, L, D)``."""
    samples, layers, nodes = attributions.shape
    counts: dict[tuple[int, int], int] = {(layer, i): 0 for layer in range(layers) for i in range(nodes)}
    for t in range(samples):
        if selection == "layer-balanced":
            groups = [[(layer, i) for i in range(nodes)] for layer in range(layers)]
        else:
            groups = [list(counts)]
        for group in groups:
            values = normalised([float(attributions[t, layer, i]) for layer, i in group])
            sign = -1 if selection == "global-high" else 1
            order = sorted(range(len(group)), key=lambda j: (sign * values[j], j))  # noqa: B023
            for j in order[: quota(q, len(group))]:
                counts[group[j]] += 1
    rows: list[list[int]] = [[] for _ in range(layers)]
    if selection == "layer-balanced":
        for layer in range(layers):
            order = sorted(range(nodes), key=lambda i: (-counts[layer, i], i))  # noqa: B023
            rows[layer] = sorted(order[: quota(q, nodes)])
    else:
        for layer, i in sorted(counts, key=lambda node: (-counts[node], node))[: quota(q, layers * nodes)]:
            rows[layer].append(i)
    return [sorted(row) for row in rows]
