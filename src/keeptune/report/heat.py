"""The cells and labels of heat maps."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable

import numpy
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, Normalize

from keeptune.report.style import INK, bare

__all__ = ["cells", "short", "wrapped"]


def cells(
    axes: Axes, table: numpy.ndarray, colours: Colormap, norm: Normalize, write: Callable[[float], str] | None
) -> None:
    """Draw a heat map with its numbers in the cells.

    Args:
        axes: The plot.
        table: The numbers, rows from top to bottom; NaN leaves a cell empty.
        colours: The colour map.
        norm: The scale.
        write: Prints a number; None draws none.
    """
    high, wide = table.shape
    edges = (numpy.arange(wide + 1) - 0.5, numpy.arange(high + 1) - 0.5)
    axes.pcolormesh(
        *edges,
        numpy.ma.masked_invalid(table),
        cmap=colours,
        norm=norm,
        edgecolors="white",
        linewidth=1.5 if write is not None else 0.6,
    )
    axes.set_xlim(-0.5, wide - 0.5)
    axes.set_ylim(high - 0.5, -0.5)
    for row, column in numpy.ndindex(high, wide):
        value = float(table[row, column])
        if write is not None and math.isfinite(value):
            red, green, blue, _ = colours(norm(value))
            dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.55
            ink = "white" if dark else INK
            axes.text(column, row, write(value), color=ink, ha="center", va="center", fontsize=8.5)
    bare(axes)
    axes.tick_params(colors=INK, length=0)


def wrapped(text: str, width: int) -> str:
    """Break a label into lines, also after hyphens.

    Args:
        text: The label.
        width: Characters on a line.

    Returns:
        At most three lines.
    """
    lines = textwrap.wrap(text, width, break_long_words=True)
    if len(lines) > 3:
        lines = [*lines[:2], f"{lines[2][: width - 1]}…"]
    return "\n".join(lines)


def short(text: str, most: int = 30) -> str:
    """Cut a long name.

    Args:
        text: The name.
        most: How many characters may stay.

    Returns:
        The name.
    """
    return text if len(text) <= most else f"{text[: most - 1]}…"
