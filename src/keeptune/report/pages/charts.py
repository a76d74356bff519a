"""Figures to explore: Plotly figures in one look, and the pieces that they are made of.

Colours are custom properties of the style sheet (``var(--c0)``, ``var(--ink)``, ...), which the page's script looks up,
so that a figure follows the reader's dark or light theme. Fonts, grid and hover boxes are the script's.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy
import plotly.graph_objects as go

from keeptune.report.numbers import number, short

MANY: Final = 8  # with more methods, what is drawn stands back so that means and labels can be read
LEAST: Final = 270  # pixels below which plotly.js has no room for the key of colours
_COLOURS: Final = 17
_NUMBERED: Final = 16  # columns up to which cells hold numbers
# The numbers of colours and shapes have no common divisor: pairs repeat only after 136 labels.
_SYMBOLS: Final = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "x", "hexagon")
_DASHES: Final = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_SCALES: Final[Mapping[str, tuple[str, str, str]]] = {
    "loss": ("--gain", "--none", "--loss"),
    "gain": ("--loss", "--none", "--gain"),
    "cool": ("--cool0", "--cool1", "--cool2"),
    "warm": ("--warm0", "--warm1", "--warm2"),
}
Ends = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Chart:
    """A figure on the page.

    ``alt`` says what it shows, for who cannot see it, and stands above it unless there is a ``caption``; ``labels`` are
    legend groups to choose one of; the height is in pixels.
    """

    name: str
    alt: str
    figure: go.Figure
    height: int = 420
    labels: tuple[str, ...] = ()
    caption: str | None = None


@dataclass(frozen=True)
class Mark:
    """How a label is drawn everywhere: by shape and dashes too, for who cannot see its colour."""

    colour: str
    symbol: str
    dash: str


def mark(index: int) -> Mark:
    """Returns the look of a label by its place among the labels."""
    return Mark(f"var(--c{index % _COLOURS})", _SYMBOLS[index % len(_SYMBOLS)], _DASHES[index % len(_DASHES)])


def plain(text: object) -> str:
    """Returns a text with its markup escaped, of which plotly.js would read some, and with line ends as spaces."""
    escaped = str(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return " ".join(escaped.split())


def hover(title: str, rows: Sequence[tuple[str, object]], most: int = 60) -> str:
    """Returns the text of a hovered point: a title, and a line of at most ``most`` characters for each value."""
    lines = [f"{plain(name)}: {plain(short(str(value), most))}" for name, value in rows if value is not None]
    return "<br>".join([f"<b>{plain(short(title, most))}</b>", *lines])


def axis(title: str, **more: Any) -> dict[str, Any]:
    """Returns an axis with a title and further keys of plotly.js."""
    return {"title": {"text": plain(title)}, **more}


def categories(names: Sequence[str], most: int = 1000) -> dict[str, Any]:
    """Returns the ticks of an axis on which the places 0, 1, ... have names; with too many some are left out."""
    shown = range(0, len(names), max(math.ceil(len(names) / most), 1))
    return {"tickmode": "array", "tickvals": list(shown), "ticktext": [plain(short(names[i], 36)) for i in shown]}


def figure_of(traces: Sequence[Any], across: Mapping[str, Any], up: Mapping[str, Any], **layout: Any) -> go.Figure:
    """Returns a figure of traces with its two axes and further keys of the layout."""
    shared = {"template": go.layout.Template(), "hovermode": "closest"}
    return go.Figure(list(traces), {**shared, "xaxis": across, "yaxis": up, **layout})


def scatter(
    label: str,
    x: Sequence[float | None],
    y: Sequence[float | None],
    drawn: Mark,
    mode: str = "lines+markers",
    **more: Any,
) -> go.Scatter:
    """Returns points or a line in the look of a label, which is also the group that a reader may choose.

    None among the places leaves a gap; ``more`` is anything of ``plotly.graph_objects.Scatter``.
    """
    line = {"color": drawn.colour, "dash": drawn.dash, "width": 2}
    marker = {"symbol": drawn.symbol, "size": 7, "color": drawn.colour}
    style = ({"line": line} if "lines" in mode else {}) | ({"marker": marker} if "markers" in mode else {})
    trace = go.Scatter(name=plain(label), legendgroup=label, x=list(x), y=list(y), mode=mode, **style)
    return trace.update(({"hoverinfo": "text"} if "hovertext" in more else {}) | more)


def arms(middles: Sequence[float], ends: Ends, colour: str, **more: Any) -> dict[str, Any]:
    """Returns error bars from the ends of intervals; they have no length where there is no interval."""
    known = [math.isfinite(low) and math.isfinite(high) for low, high in ends]
    up = [max(end[1] - mid, 0.0) if ok else 0.0 for mid, end, ok in zip(middles, ends, known, strict=True)]
    down = [max(mid - end[0], 0.0) if ok else 0.0 for mid, end, ok in zip(middles, ends, known, strict=True)]
    return {"type": "data", "array": up, "arrayminus": down, "color": colour, "thickness": 1, "width": 3, **more}


def heat_map(
    values: Any,
    axes: tuple[tuple[str, Sequence[str]], tuple[str, Sequence[str]]],
    scale: str,
    said: str,
    write: Callable[[float], str] | None = None,
    span: tuple[float, float] | None = None,
    least: float | None = None,
) -> go.Figure:
    """Returns a heat map, the first row on top; NaN leaves a cell empty.

    Args:
        values: Rows of numbers.
        axes: What the rows are, and their names; the same of the columns.
        scale: ``"loss"`` or ``"gain"`` (two-sided), ``"cool"`` or ``"warm"``.
        said: What the numbers are.
        write: Prints a number in its cell, where the columns are few; None prints it when hovered.
        span: The ends of the colours; None takes those of the numbers.
        least: Makes colours logarithmic: numbers below it have its colour, zero leaves a cell empty.
    """
    (down, rows), (across, columns) = axes
    table, told = numpy.array(values, dtype=float), write or number
    texts = [["" if math.isnan(value) else plain(told(value)) for value in row] for row in table]
    shown, ticks = write is not None and len(columns) <= _NUMBERED, {}
    if least is not None:
        table = numpy.log10(table, out=numpy.full(table.shape, math.nan), where=table > 0)
        low, high = float(numpy.nanmin(table)), float(numpy.nanmax(table))
        low = max(low, math.log10(least)) if least > 0 else low
        span = (low, high) if high - low > 0.01 else (low - 0.3, high + 0.3)
        places = [float(place) for place in numpy.linspace(*span, 4)]
        ticks = {"tickvals": places, "ticktext": [told(10**place) for place in places]}
    good = table[numpy.isfinite(table)]
    low, high = span or (float(good.min(initial=math.inf)), float(good.max(initial=-math.inf))) if good.size else (0, 1)
    place = [f"{plain(name)} %{{customdata[{part}]}}" for part, name in enumerate((down, across))]
    trace = go.Heatmap(
        z=table.tolist(),
        x=list(range(len(columns))),
        y=list(range(len(rows))),
        zmin=low,
        zmax=high if high > low else low + 1,
        colorscale=[[part / 2, f"var({name})"] for part, name in enumerate(_SCALES[scale])],
        colorbar={"title": {"text": plain(said), "side": "right"}, "thickness": 12, "outlinewidth": 0, **ticks},
        xgap=1,
        ygap=1,
        hoverongaps=False,
        text=texts,
        customdata=[[[plain(row), plain(column)] for column in columns] for row in rows],
        hovertemplate=f"{place[0]}<br>{place[1]}<br>{plain(said)}: %{{text}}<extra></extra>",
        **({"texttemplate": "%{text}"} if shown else {}),
    )
    bare = {"showgrid": False, "zeroline": False}
    most = 20 if max(map(len, columns), default=0) < 8 else 40
    x = axis(across, **categories(columns, most), **bare)
    return figure_of([trace], x, axis(down, **categories(rows, 40), **bare, autorange="reversed"))


def map_chart(name: str, words: str, figure: go.Figure, pixels: int = 26, most: int = 24) -> Chart:
    """Returns a map as a chart that is as high as its rows need, up to ``most`` of them."""
    return Chart(name, words, figure, max(130 + pixels * min(len(figure.data[0].z), most), LEAST))


Placed = Sequence[tuple[int, str, float | None]]


def role_map(name: str, words: str, cells: Placed, scale: str, said: str, **more: Any) -> list[Chart]:
    """Returns a map of roles by layers; empty where no block has a number.

    Cells are layer (-1 is outside any block), role and number; the rest is as in :func:`heat_map`, but that colours are
    from zero to the largest by default.
    """
    placed = [(layer, role, math.nan if value is None else value) for layer, role, value in cells if layer >= 0]
    # All layers, so that maps of one plan stand in line.
    layers = sorted({layer for layer, _, _ in placed})
    roles = list(dict.fromkeys(role for _, role, value in placed if math.isfinite(value)))
    table = numpy.full((len(roles), len(layers)), math.nan)
    for layer, role, value in placed:
        if role in roles:
            table[roles.index(role), layers.index(layer)] = value
    good = table[numpy.isfinite(table)]
    if not good.size:
        return []
    form = ".0f" if (good == good.astype(int)).all() else ".2g"
    given: dict[str, Any] = {"write": lambda value: f"{value:{form}}", "span": (min(0.0, good.min()), good.max())}
    axes = ("", roles), ("layer", [str(layer) for layer in layers])
    return [map_chart(name, words, heat_map(table, axes, scale, said, **(given | more)))]


def thin(curve: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """Returns at most about 400 points of a curve, the last one among them, as places and values."""
    points = [*curve[: -1 : max(len(curve) // 400, 1)], *curve[-1:]]
    return [x for x, _ in points], [y for _, y in points]
