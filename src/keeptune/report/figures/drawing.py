"""What all matplotlib figures share: theme, colours and shapes, heat maps, lines, frames, saving."""

from __future__ import annotations

import io
import math
import os
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import matplotlib
import numpy
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from keeptune.core.artefact import write_bytes

INK: Final = "#22262b"
MUTED: Final = "#5f6872"
RULE: Final = "#d5dade"
# Okabe and Ito's colour-blind-safe palette without yellow and black, then darker and paler tones for many labels.
_COLOURS: Final = (
    *("#0072b2", "#d55e00", "#009e73", "#aa4499", "#e69f00", "#56b4e9", "#7a7a7a", "#332288", "#882255"),
    *("#117733", "#cc6677", "#7a5c00", "#5b3a1e", "#44aa99", "#222222", "#b0a0d8", "#999933"),
)
# The numbers of colours and shapes have no common divisor, so that pairs repeat only after 136 labels.
_SHAPES: Final = ("o", "s", "^", "D", "v", "P", "X", "h")
_DASHES: Final = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)), (0, (9, 2)), (0, (9, 2, 1, 2)))
_SCALES: Final[Mapping[str, tuple[str, ...]]] = {
    "gains": ("#c44e12", "#f6b796", "#ffffff", "#8ebcdc", "#2b7bba"),
    "cool": ("#eef4f9", "#7fb2d9", "#0b5c96", "#04304f"),
    "warm": ("#fdf3ec", "#f0a875", "#c44e12", "#6b2503"),
}
_THEME: Final[Any] = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    **{f"{axis}tick.{kind}.size": 0 for axis in "xy" for kind in ("major", "minor")},
    "grid.color": "#e9ecef",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.fonttype": "none",
    "svg.hashsalt": "keeptune",
    # A dollar sign in a method's name is not mathematics.
    "text.parse_math": False,
    "text.usetex": False,
}


@dataclass(frozen=True)
class Look:
    """How a label is drawn everywhere: colour, marker and dashes."""

    colour: str
    shape: str
    dash: Any


def look(index: int) -> Look:
    """Returns the look of a label by its place among the labels."""
    return Look(_COLOURS[index % len(_COLOURS)], _SHAPES[index % len(_SHAPES)], _DASHES[index % len(_DASHES)])


def colours_of(scale: str) -> LinearSegmentedColormap:
    """Returns a scale of colours: ``"gains"`` (losses, none, gains), ``"cool"`` or ``"warm"``."""
    return LinearSegmentedColormap.from_list(scale, _SCALES[scale])


@contextmanager
def themed() -> Iterator[None]:
    """Applies the theme to what is built inside, and restores the settings afterwards."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_THEME)
        yield


def page(width: float, height: float) -> Figure:
    """Returns an empty figure of so many inches, with a canvas that can measure text."""
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def finish(figure: Figure) -> Figure:
    """Returns the figure with its layout and tick labels fixed while the theme applies."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def bare(axes: Axes, keep: Sequence[str] = ()) -> None:
    """Hides the frame of a plot but for some sides."""
    for side, spine in axes.spines.items():
        spine.set_visible(side in keep)


def frame(axes: Axes, across: str = "", up: str = "", *, layers: bool = False, ticks: int = 6) -> None:
    """Draws grid, two sides and labels of a plot of lines; an axis that counts ``layers`` has whole numbers."""
    axes.grid(visible=True)
    bare(axes, ("left", "bottom"))
    if across:
        axes.set_xlabel(across, color=INK)
    if up:
        axes.set_ylabel(up)
    if layers:
        axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 2.5, 5, 10]))


def line(axes: Axes, places: Sequence[tuple[float, float]], drawn: Look, label: str, **more: Any) -> None:
    """Draws a line with markers through places in order, in the look of a label; ``more`` is matplotlib's."""
    style: dict[str, Any] = {
        "color": drawn.colour,
        "marker": drawn.shape,
        "ms": 5.5,
        "mec": "white",
        "mew": 0.6,
        "lw": 1.6,
        "zorder": 4,
    }
    axes.plot([x for x, _ in places], [y for _, y in places], label=label, **(style | more))


def bars(axes: Axes, places: Sequence[tuple[float, float, float]], colour: str, **more: Any) -> None:
    """Draws upright 95% intervals ``(x, low, high)``; those without ends are left out."""
    style: dict[str, Any] = {"color": colour, "lw": 1.5, "alpha": 0.65, "zorder": 3}
    for x, low, high in places:
        if math.isfinite(low) and math.isfinite(high):
            axes.plot([x, x], [low, high], **(style | more))


def legend(axes: Axes, **more: Any) -> None:
    """Writes the legend to the right of a plot, in the colours of its lines."""
    place = {"loc": "center left", "bbox_to_anchor": (1.0, 0.5), "labelcolor": "linecolor"}
    axes.legend(**(place | more))


def caption(figure: Figure, text: str) -> None:
    """Writes a line below a figure."""
    figure.supxlabel(text, fontsize=8.5, color=MUTED, x=0.99, ha="right")


def heat_map(
    axes: Axes, table: numpy.ndarray, colours: Colormap, norm: Normalize, write: Callable[[float], str] | None
) -> None:
    """Draws a heat map of ``(rows, columns)``, the first row on top; NaN leaves a cell white.

    Colours are those of ``norm``; ``write`` turns a number into the text in its cell, None writes none.
    """
    high, wide = table.shape
    edges = (numpy.arange(wide + 1) - 0.5, numpy.arange(high + 1) - 0.5)
    style: dict[str, Any] = {
        "cmap": colours,
        "norm": norm,
        "edgecolors": "white",
        "linewidth": 0.6 if write is None else 1.5,
    }
    axes.pcolormesh(*edges, numpy.ma.masked_invalid(table), **style)
    axes.set_xlim(-0.5, wide - 0.5)
    axes.set_ylim(high - 0.5, -0.5)
    for (row, column), value in numpy.ndenumerate(table):
        if write is not None and math.isfinite(value):
            red, green, blue, _ = colours(norm(value))
            ink = "white" if 0.3 * red + 0.59 * green + 0.11 * blue < 0.55 else INK
            axes.text(column, row, write(value), color=ink, ha="center", va="center", fontsize=8.5)
    bare(axes)
    axes.tick_params(colors=INK, length=0)


def key(figure: Figure, axes: Axes | Sequence[Axes], colours: Colormap, norm: Normalize, label: str) -> Colorbar:
    """Returns the key of colours, drawn beside one or several plots."""
    bar = figure.colorbar(ScalarMappable(norm, colours), ax=axes, aspect=20, pad=0.03)
    bar.set_label(label, fontsize=8.5)
    bar.outline.set_visible(False)
    return bar


def layer_ticks(set_ticks: Any, names: Sequence[object], inches: float, least: float = 0.2) -> None:
    """Names the rows or columns of a heat map, so many inches wide or high, with some left out to keep a distance.

    ``set_ticks`` is ``set_xticks`` or ``set_yticks`` of a plot.
    """
    stride = max(math.ceil(least / inches), 1)
    set_ticks(list(range(0, len(names), stride)), [str(name) for name in names[::stride]])


def wrapped(text: str, width: int) -> str:
    """Returns a label broken into at most three lines."""
    lines = textwrap.wrap(text, width, break_long_words=True)
    return "\n".join(lines if len(lines) <= 3 else [*lines[:2], f"{lines[2][: width - 1]}…"])


def svg(figure: Figure) -> str:
    """Returns a figure as SVG; the same figure always gives the same text."""
    buffer = io.StringIO()
    with themed():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    # Matplotlib names only the font it measured with; readers may lack it.
    return buffer.getvalue().replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")


def png(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes a figure as a PNG file, into a folder that exists."""
    with themed():
        figure.savefig(Path(path), format="png", dpi=160, metadata={"Software": None})


def save(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Writes figures as PNG and SVG into a folder, which is made, and returns the files."""
    written = []
    for name, figure in figures.items():
        write_bytes(folder / f"{name}.svg", svg(figure).encode())
        png(figure, folder / f"{name}.png")
        written += [folder / f"{name}.svg", folder / f"{name}.png"]
    return written
