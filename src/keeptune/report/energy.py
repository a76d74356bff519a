"""The figure of FARSS Fig. 1: how the energy of the weights is concentrated along the depth."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from keeptune.report.heat import short
from keeptune.report.style import INK, RULE, bare, finish, page, themed

__all__ = ["energy_figure", "layer_means"]

_COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#b07c00", "#3a87b8", "#7a7a7a", "#8c4a2f")
_SHAPES: Final = ("o", "s", "^", "D", "v", "P", "X", "h")


def layer_means(rows: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Average the energy over the targets of each layer, each counting the same.

    Args:
        rows: ``layer`` and ``energy`` of each target; a target outside blocks (layer -1) and one without energy
            (None: all weights are zero) are left out.

    Returns:
        Layer to mean, from the first layer to the last.
    """
    layers: dict[int, list[float]] = {}
    for row in rows:
        if row["layer"] >= 0 and row["energy"] is not None:
            layers.setdefault(row["layer"], []).append(row["energy"])
    return {layer: math.fsum(layers[layer]) / len(layers[layer]) for layer in sorted(layers)}


def energy_figure(rows: Sequence[Mapping[str, Any]], top: int, name: str) -> Figure | None:
    """Plot the share of the energy in the top singular values against depth, a line for each role and their mean.

    Args:
        rows: ``layer``, ``role`` and ``energy`` of each target.
        top: How many singular values.
        name: The model, for the title.

    Returns:
        The figure; None when no target lies in a block. Of more than eight roles only the mean has a colour.
    """
    means = layer_means(rows)
    if not means:
        return None
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["layer"] >= 0 and row["energy"] is not None:
            lines.setdefault(row["role"], []).append((row["layer"], row["energy"]))
    with themed():
        figure = page(7.0, 3.8)
        axes = figure.subplots()
        few = len(lines) <= len(_COLOURS)
        for index, (role, places) in enumerate(lines.items()):
            colour = _COLOURS[index % len(_COLOURS)] if few else RULE
            label = short(role, 24) if few else (f"{len(lines)} roles" if index == 0 else None)
            _line(axes, places, color=colour, marker=_SHAPES[index % len(_SHAPES)], lw=1.2, ms=4.5, label=label)
        mean = list(means.items())
        _line(axes, mean, color=INK, marker="o", lw=2.4, ms=6, mec="white", label="mean", zorder=5)
        axes.set_title(f"{short(name, 40)}: energy in the top {top} singular values")
        axes.set_xlabel("layer")
        axes.set_ylabel("share of the sum of squares")
        axes.grid(visible=True)
        bare(axes, ("left", "bottom"))
        axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axes.set_ylim(bottom=0)
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9, labelcolor="linecolor")
        return finish(figure)


def _line(axes: Axes, places: Sequence[tuple[int, float]], **style: Any) -> None:
    ordered = sorted(places)
    axes.plot([layer for layer, _ in ordered], [energy for _, energy in ordered], **style)
