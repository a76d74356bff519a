"""Charts of the pages as PNG and SVG files: Plotly's figures, drawn by matplotlib, which needs no browser."""

import functools
import html
import io
import pkgutil
import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib
import numpy
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import MultipleLocator, NullLocator

from keeptune.core.artefact import write_bytes
from keeptune.report.pages.charts import Chart

_PIXELS: Final = 96  # of a page in an inch
_SYMBOLS: Final = {
    **{"circle": "o", "square": "s", "triangle-up": "^", "diamond": "D", "triangle-down": "v"},
    **{"cross": "P", "x": "X", "hexagon": "h", "star": "*"},
}
_DASHES: Final[dict[str, Any]] = {
    **{"solid": "-", "dash": (0, (5, 2)), "dot": (0, (1, 1.5)), "dashdot": (0, (5, 2, 1, 2))},
    **{"longdash": (0, (9, 2)), "longdashdot": (0, (9, 2, 1, 2))},
}
_STYLE: Final = Path(__file__).parent / "pages" / "templates" / "figures.mplstyle"


def write_figure(charts: Sequence[Chart], path: Path, note: str = "", across: int = 1) -> None:
    """Writes charts, one below the other, as a PNG or SVG file; the same charts always give the same bytes.

    The ending of the path, ``.png`` or ``.svg``, decides; a ``note`` stands below, ``across`` charts side by side.
    """
    buffer = io.BytesIO()
    metadata = {"Date": None, "Creator": None} if path.suffix == ".svg" else {"Software": None}
    with matplotlib.rc_context():
        matplotlib.rc_file(_STYLE)
        drawn(charts, note, across).savefig(buffer, format=path.suffix[1:], dpi=160, metadata=metadata)
    # Matplotlib names only the font it measured with; readers may lack it.
    write_bytes(path, buffer.getvalue().replace(b"'DejaVu Sans'", b"'DejaVu Sans', Verdana, sans-serif"))


def write_figures(charts: Iterable[Chart | None], folder: Path) -> None:
    """Writes each chart that there is into a folder, which is made, as PNG and SVG under its name."""
    for chart in filter(None, charts):
        for ending in ("svg", "png"):
            write_figure([chart], folder / f"{chart.name}.{ending}")


def drawn(charts: Sequence[Chart], note: str = "", across: int = 1) -> Figure:
    """Returns charts as a matplotlib figure; arguments of :func:`write_figure`."""
    rows = [charts[at : at + across] for at in range(0, len(charts), across)]
    heights = [max(chart.height for chart in row) / _PIXELS for row in rows]
    figure = Figure(figsize=(8.4 if across == 1 else 5.2 * across, sum(heights)), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(rows), across, squeeze=False, height_ratios=heights)
    for axes, chart in zip(panels.flat, charts, strict=False):
        _draw(figure, axes, chart)
    for axes in panels.flat[len(charts) :]:
        axes.set_visible(False)
    if note:
        figure.supxlabel(note, fontsize=8, x=0.99, ha="right")
    return figure


@functools.cache
def _palette() -> dict[str, str]:
    """Returns the colours of the light theme by name, from the style sheet of the pages."""
    css = (pkgutil.get_data("keeptune.report.pages", "templates/page.css") or b"").decode().partition("@media")[0]
    return dict(re.findall(r"--(\w+): (#\w+)", css))


def _colour(name: str) -> str:
    return _palette()[name[6:-1]] if name.startswith("var(") else name


def _draw(figure: Figure, axes: Axes, chart: Chart) -> None:
    layout, handles = chart.figure.layout, []
    axes.set_title(
        "\n".join(
            textwrap.wrap(chart.caption or chart.alt, int(11 * axes.get_position().width * figure.get_figwidth()))
        )
    )
    axes.set(xscale=layout.xaxis.type or "linear", yscale=layout.yaxis.type or "linear")
    for trace in chart.figure.data:
        if trace.type == "heatmap":
            _heat_map(figure, axes, trace)
        elif trace.type == "bar":
            axes.bar(trace.x, trace.y, 0.7, color=_colour(trace.marker.color))
        else:
            handles += _scatter(axes, trace)
    for shape in layout.shapes:
        _shape(axes, shape)
    for axis, given in ((axes.xaxis, layout.xaxis), (axes.yaxis, layout.yaxis)):
        _axis(axes, axis, given)
    if len(handles) > 1:
        axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8)


def _scatter(axes: Axes, trace: Any) -> list[Line2D]:
    """Draws points or a line; returns what stands for them in the legend."""
    x, y = (numpy.array(values, dtype=float) for values in (trace.x, trace.y))
    colour, alpha = _colour(trace.marker.color or trace.line.color), trace.opacity or 1.0
    label, marked = html.unescape(trace.name or ""), "markers" in trace.mode
    style: dict[str, Any] = {"color": colour, "alpha": alpha, "lw": 0}
    if "lines" in trace.mode:
        style |= {"ls": _DASHES[trace.line.dash or "solid"], "lw": 0.75 * (trace.line.width or 2)}
        axes.plot(x, y, zorder=2, **style)
    symbols, sizes = (_each(value, len(x)) for value in (trace.marker.symbol or "circle", trace.marker.size or 7))
    for place, symbol in enumerate(symbols if marked else ()):
        name = symbol.removesuffix("-open")
        face, edge = ("white", colour) if name != symbol else (colour, "white")
        look: dict[str, Any] = {"mfc": face, "mec": edge, "mew": 0.7, "alpha": trace.marker.opacity or alpha}
        axes.plot(x[place], y[place], _SYMBOLS[name], ms=0.75 * sizes[place], zorder=4, **look)
    for bars, way in ((trace.error_x, "xerr"), (trace.error_y, "yerr")):
        if bars.array is not None and bars.visible is not False:
            ends: Any = {way: numpy.array([bars.arrayminus, bars.array], dtype=float)}
            axes.errorbar(x, y, fmt="none", ecolor=_colour(bars.color), elinewidth=1, alpha=0.65, zorder=3, **ends)
    if trace.showlegend is False or not label:
        return []
    sign = _SYMBOLS[symbols[0].removesuffix("-open")] if marked else ""
    return [Line2D([], [], label=textwrap.shorten(label, 36, placeholder="…"), marker=sign, mec="white", **style)]


def _heat_map(figure: Figure, axes: Axes, trace: Any) -> None:
    table = numpy.array(trace.z, dtype=float)
    high, wide = table.shape
    colours = LinearSegmentedColormap.from_list("scale", [(at, _colour(name)) for at, name in trace.colorscale])
    norm = Normalize(trace.zmin, trace.zmax)
    edges = (numpy.arange(wide + 1) - 0.5, numpy.arange(high + 1) - 0.5)
    gaps: dict[str, Any] = {"edgecolors": "white", "linewidth": 0.5 if trace.xgap and wide * high < 2500 else 0}
    axes.pcolormesh(*edges, numpy.ma.masked_invalid(table), cmap=colours, norm=norm, **gaps)
    axes.set(xlim=edges[0][[0, -1]], ylim=edges[1][[-1, 0]])
    axes.spines[:].set_visible(False)
    if trace.texttemplate is None:
        bar = figure.colorbar(ScalarMappable(norm, colours), ax=axes, aspect=20, pad=0.02)
        bar.set_label(html.unescape(trace.colorbar.title.text), fontsize=8)
        bar.outline.set_visible(False)
        if trace.colorbar.tickvals is not None:
            bar.set_ticks(trace.colorbar.tickvals, labels=trace.colorbar.ticktext)
        return
    for row, column in zip(*numpy.isfinite(table).nonzero(), strict=True):
        red, green, blue, _ = colours(norm(table[row, column]))
        ink = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.55 else "#22262b"
        axes.text(column, row, html.unescape(trace.text[row][column]), color=ink, ha="center", va="center", fontsize=8)


def _shape(axes: Axes, shape: Any) -> None:
    style: dict[str, Any] = {"lw": shape.line.width or 1, "ls": _DASHES[shape.line.dash or "solid"]}
    colour = _colour(shape.line.color)
    if shape.type == "rect":
        corner, size = (shape.x0, shape.y0), (shape.x1 - shape.x0, shape.y1 - shape.y0)
        axes.add_patch(Rectangle(corner, *size, fill=False, ec=colour, **style))
    elif shape.y0 == shape.y1:
        axes.axhline(shape.y0, color=colour, zorder=1, **style)
    else:
        axes.axvline(shape.x0, color=colour, zorder=1, **style)


def _axis(axes: Axes, axis: Any, given: Any) -> None:
    """Gives an axis the title, the ticks and the ends of one of Plotly's."""
    letter = axis.axis_name
    axis.set_label_text(html.unescape(given.title.text or ""))
    if given.showgrid is not False:
        axis.grid(visible=True)
    if given.type == "log":
        axis.set_major_formatter(lambda value, _: f"{value:g}")
    if given.tickvals is not None:
        names = [html.unescape(str(name)) for name in given.ticktext or given.tickvals]
        crowded = letter == "x" and 0.07 * sum(map(len, names)) > axes.get_position().width * 8
        turned: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"} if crowded else {}
        axis.set_ticks(given.tickvals, names, **turned)
        axis.set_minor_locator(NullLocator())
    elif isinstance(given.dtick, int | float) and given.type != "log":
        axis.set_major_locator(MultipleLocator(given.dtick))
    if given.side == "top":
        axes.xaxis.tick_top()
    if given.rangemode == "tozero":
        axes.set(**{f"{letter}lim": (0, None)})
    if given.range is not None:
        axes.set(**{f"{letter}lim": given.range})
    elif given.autorange == "reversed" and not axis.get_inverted():
        axis.set_inverted(True)


def _each(value: Any, count: int) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else [value] * count
