"""The look shared by all figures: colours by method, fonts, and saving without a trace of the clock."""

from __future__ import annotations

import io
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, to_hex, to_rgb
from matplotlib.figure import Figure

from keeptune.report.records import Report
from keeptune.report.summary import methods

__all__ = [
    "INK",
    "MANY",
    "MUTED",
    "RULE",
    "Look",
    "bare",
    "diverging",
    "ends",
    "finish",
    "look",
    "looks",
    "page",
    "png",
    "svg",
    "themed",
]

INK: Final = "#22262b"
MANY: Final = 8  # with more methods, what is drawn stands back so that means and labels can be read
MUTED: Final = "#5f6872"
RULE: Final = "#d5dade"
# Okabe and Ito's colour-blind-safe palette without yellow and black, then darker and paler tones for many methods.
_FIRST: Final = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#e69f00", "#56b4e9", "#7a7a7a")
_MORE: Final = (
    *("#332288", "#882255", "#117733", "#cc6677", "#7a5c00", "#5b3a1e"),
    *("#44aa99", "#222222", "#b0a0d8", "#999933"),
)
_COLOURS: Final = (*_FIRST, *_MORE)
# The numbers of colours and shapes have no common divisor, so that pairs repeat only after 136 methods.
_SHAPES: Final = ("o", "s", "^", "D", "v", "P", "X", "h")


@dataclass(frozen=True)
class Look:
    """How a method is drawn everywhere: fill colour, marker shape, and a darker colour for text."""

    colour: str
    shape: str
    text: str


def looks(report: Report) -> dict[str, Look]:
    """Give every method its colour and shape.

    Args:
        report: The report.

    Returns:
        The look of each label, by order of first appearance.
    """
    return {method.label: look(index) for index, method in enumerate(methods(report))}


def look(index: int) -> Look:
    """Give the look of a label.

    Args:
        index: Its place among the labels.

    Returns:
        Colour, shape, and the colour of its text.
    """
    colour = _COLOURS[index % len(_COLOURS)]
    return Look(colour, _SHAPES[index % len(_SHAPES)], _darken(colour))


@contextmanager
def themed() -> Iterator[None]:
    """Apply the theme to what is built inside, and put the settings back afterwards.

    Yields:
        Nothing.
    """
    settings: Any = {
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
        "axes.unicode_minus": True,
        "text.color": INK,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "xtick.labelsize": 9,
        "ytick.labelsize": 9,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "xtick.minor.size": 0,
        "ytick.minor.size": 0,
        "grid.color": "#e9ecef",
        "grid.linewidth": 0.8,
        "figure.facecolor": "white",
        "savefig.facecolor": "white",
        "svg.fonttype": "none",
        "svg.hashsalt": "keeptune",
        # A dollar sign in a method's name is not mathematics.
        "text.parse_math": False,
        "text.usetex": False,
        "path.simplify": True,
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings)
        yield


def page(width: float, height: float) -> Figure:
    """Make an empty figure with a canvas that can measure text.

    Args:
        width: Inches.
        height: Inches.

    Returns:
        The figure.
    """
    figure = Figure(figsize=(width, height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def finish(figure: Figure) -> Figure:
    """Settle layout and tick labels while the theme applies.

    Args:
        figure: The figure.

    Returns:
        The same figure, its layout frozen.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    return figure


def bare(axes: Axes, keep: Sequence[str] = ()) -> None:
    """Hide the frame of a plot.

    Args:
        axes: The plot.
        keep: Sides of the frame to keep.
    """
    for side, spine in axes.spines.items():
        spine.set_visible(side in keep)


def diverging() -> LinearSegmentedColormap:
    """Make the map for gains and losses.

    Returns:
        Blue for gains, white for none, vermilion for losses.
    """
    stops = [(0.0, "#2b7bba"), (0.5, "#ffffff"), (0.75, "#f6b796"), (1.0, "#c44e12")]
    return LinearSegmentedColormap.from_list("loss", stops)


def ends(values: Sequence[float], least: float) -> tuple[float, float]:
    """Find the range of some numbers.

    Args:
        values: The numbers; NaN is skipped.
        least: The least width of the range.

    Returns:
        Its ends.
    """
    good = [value for value in values if math.isfinite(value)]
    low, high = min(good), max(good)
    pad = max(least - (high - low), 0) / 2
    return low - pad, high + pad


def svg(figure: Figure) -> str:
    """Draw a figure as SVG; the same figure always gives the same text.

    Args:
        figure: The figure.

    Returns:
        The SVG document.
    """
    buffer = io.StringIO()
    with themed():
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    # Matplotlib names only the font it measured with; readers may lack it.
    return buffer.getvalue().replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")


def png(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Draw a figure into a PNG file.

    Args:
        figure: The figure.
        path: The file; its folder must exist.
    """
    with themed():
        figure.savefig(Path(path), format="png", dpi=160, metadata={"Software": None})


def _darken(colour: str) -> str:
    """Darken a colour until it can be read as text on white.

    Args:
        colour: The colour.

    Returns:
        A colour with a contrast of at least 4.5 against white.
    """
    mix = to_rgb(colour)
    while _contrast(mix) < 4.5:
        mix = (mix[0] * 0.95, mix[1] * 0.95, mix[2] * 0.95)
    return to_hex(mix)


def _contrast(colour: tuple[float, float, float]) -> float:
    """Compute the contrast of a colour against white as WCAG defines it.

    Args:
        colour: Red, green and blue in [0, 1].

    Returns:
        The contrast, from 1 to 21.
    """
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in colour]
    return 1.05 / (0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2] + 0.05)
