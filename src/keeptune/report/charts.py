"""Figures to explore, as plain JSON for plotly.js.

Colours are named by custom properties of the style sheet (``--c0``, ``--ink``, ...), which the script looks up, so
that a figure follows the reader's dark or light theme.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from keeptune.report.heat import short
from keeptune.report.wording import number

__all__ = ["Chart", "Mark", "axis", "errors", "heat_map", "hover", "mark", "plain"]

_COLOURS: Final = 17
# The numbers of colours and shapes have no common divisor: pairs repeat only after 136 labels.
_SYMBOLS: Final = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "hexagon")
_DASHES: Final = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_SCALES: Final[Mapping[str, list[list[Any]]]] = {
    "loss": [[0, "--gain"], [0.5, "--none"], [1, "--loss"]],
    "cool": [[0, "--cool0"], [0.5, "--cool1"], [1, "--cool2"]],
    "warm": [[0, "--warm0"], [0.5, "--warm1"], [1, "--warm2"]],
}


@dataclass(frozen=True)
class Chart:
    """A figure on the page.

    Args:
        name: Its id.
        alt: What it shows, for who cannot see it.
        caption: What stands above it; may be empty.
        figure: ``data`` and ``layout`` of plotly.js.
        height: Pixels.
        labels: Legend groups to choose one of, where the page offers that.
    """

    name: str
    alt: str
    caption: str
    figure: Mapping[str, Any]
    height: int = 420
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Mark:
    """How a label is drawn everywhere: told apart by shape and dashes too, for who cannot by colour."""

    colour: str
    symbol: str
    dash: str


def mark(index: int) -> Mark:
    """Give the look of a label.

    Args:
        index: Its place among the labels.

    Returns:
        Colour, shape and dashes.
    """
    return Mark(f"--c{index % _COLOURS}", _SYMBOLS[index % len(_SYMBOLS)], _DASHES[index % len(_DASHES)])


def plain(text: object) -> str:
    """Keep plotly.js, which reads some HTML in texts, from reading any in this one.

    Args:
        text: Any text.

    Returns:
        The text with its markup escaped and line ends as spaces.
    """
    escaped = str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return " ".join(escaped.split())


def hover(title: str, rows: Sequence[tuple[str, object]], most: int = 60) -> str:
    """Write what appears when a point is hovered.

    Args:
        title: The first line.
        rows: Names and values, a line each; values of None are left out.
        most: Characters of a value.

    Returns:
        The markup.
    """
    lines = [f"{plain(name)}: {plain(short(str(value), most))}" for name, value in rows if value is not None]
    return "<br>".join([f"<b>{plain(short(title, most))}</b>", *lines])


def axis(title: str, **more: Any) -> dict[str, Any]:
    """Make an axis with a title.

    Args:
        title: The title.
        more: Further keys of plotly.js.

    Returns:
        The axis.
    """
    return {"title": {"text": plain(title)}, **more}


def errors(value: float, low: float, high: float) -> tuple[float, float]:
    """Turn an interval into the lengths of its arms.

    Args:
        value: The estimate.
        low: The low end; NaN when there is none.
        high: The high end.

    Returns:
        The lengths up and down, zero where there is no interval.
    """
    if not (math.isfinite(low) and math.isfinite(high)):
        return 0.0, 0.0
    return max(high - value, 0.0), max(value - low, 0.0)


def heat_map(
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    scale: str,
    across: str,
    down: str,
    said: str,
    texts: Sequence[Sequence[str]] | None = None,
    span: tuple[float, float] | None = None,
    ticks: tuple[Sequence[float], Sequence[str]] | None = None,
    decimals: int = 3,
) -> dict[str, Any]:
    """Make a heat map, the first row on top.

    Args:
        values: Rows of numbers; NaN leaves a cell empty.
        rows: Names of the rows.
        columns: Names of the columns.
        scale: ``"loss"`` (two-sided), ``"cool"`` or ``"warm"``.
        across: What the columns are.
        down: What the rows are.
        said: What the numbers are.
        texts: What a cell says; None prints its number when hovered, and nothing in the cell.
        span: The ends of the colours; None takes those of the numbers.
        ticks: Places and texts on the key of colours.
        decimals: Decimals of the numbers.

    Returns:
        Data and layout.
    """
    printed = [[number(value, decimals) for value in row] for row in values]
    good = [value for row in values for value in row if math.isfinite(value)]
    low, high = span or (min(good, default=0.0), max(good, default=1.0))
    bar: dict[str, Any] = {"title": {"text": plain(said), "side": "right"}, "thickness": 12, "outlinewidth": 0}
    if ticks is not None:
        bar |= {"tickvals": list(ticks[0]), "ticktext": [plain(text) for text in ticks[1]]}
    trace = {
        "type": "heatmap",
        "z": [list(row) for row in values],
        "x": list(range(len(columns))),
        "y": list(range(len(rows))),
        "zmin": low,
        "zmax": high if high > low else low + 1,
        "colorscale": _SCALES[scale],
        "colorbar": bar,
        "xgap": 1,
        "ygap": 1,
        "hoverongaps": False,
        "text": [[plain(text) for text in row] for row in (texts or printed)],
        "customdata": [[[plain(row), plain(column)] for column in columns] for row in rows],
        "hovertemplate": f"{plain(down)} %{{customdata[0]}}<br>{plain(across)} %{{customdata[1]}}<br>"
        f"{plain(said)}: %{{text}}<extra></extra>",
    }
    if texts is not None:
        trace["texttemplate"] = "%{text}"
    return {
        "data": [trace],
        "layout": {
            "xaxis": axis(
                across,
                **_ticks(columns, 20 if max(map(len, columns), default=0) < 8 else 40),
                showgrid=False,
                zeroline=False,
            ),
            "yaxis": axis(down, **_ticks(rows, 40), showgrid=False, zeroline=False, autorange="reversed"),
        },
    }


def _ticks(names: Sequence[str], most: int) -> dict[str, Any]:
    stride = max(math.ceil(len(names) / most), 1)
    shown = range(0, len(names), stride)
    return {"tickmode": "array", "tickvals": list(shown), "ticktext": [plain(short(names[i], 36)) for i in shown]}
