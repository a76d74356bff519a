"""What the figures of docs/results share: theme, colours and shapes, frames, saving."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

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


def png(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes a figure as a PNG file, into a folder that exists."""
    with themed():
        figure.savefig(Path(path), format="png", dpi=160, metadata={"Software": None})
