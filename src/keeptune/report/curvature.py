"""Where updates lie against curvature: their shares by tenths, from the stiffest to the most flexible directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter
from rich.console import Console

from keeptune.report.grid import table_frame
from keeptune.report.heat import short
from keeptune.report.style import INK, MUTED, RULE, bare, finish, page, themed

__all__ = ["curvature_figure", "print_curvature"]

_COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#b07c00", "#3a87b8", "#7a7a7a", "#8c4a2f")
_SHAPES: Final = ("o", "s", "^", "D", "v", "P", "X", "h")
_SIDES: Final = {"input": "input side", "output": "output side"}
Sources = Sequence[Mapping[str, Any]]


def print_curvature(record: Mapping[str, Any], console: Console) -> None:
    """Print, for each model and side, the curvature felt and the shares in the stiffest and the most flexible tenths.

    Args:
        record: As in ``curvature.json``.
        console: Where to print.
    """
    table = table_frame()
    table.add_column("update of")
    table.add_column("side")
    for head in ("curvature felt", "in stiffest half of curvature", "in stiffest tenth of directions"):
        table.add_column(head, justify="right")
    for source in record["sources"]:
        for side, found in source["sides"].items():
            stiff = sum(found["curvature"][: len(found["curvature"]) // 2])
            shares = (f"{100 * stiff:.1f}%", f"{100 * found['directions'][0]:.1f}%")
            table.add_row(short(source["label"], 40), side, f"{found['felt']:.2f}", *shares)
    console.print(table)
    console.print("curvature felt: per unit of the update; 1 for one that knows nothing of it", soft_wrap=True)


def curvature_figure(record: Mapping[str, Any]) -> Figure | None:
    """Draw the shares of the updates by tenths of the curvature and of the directions, a column for each side.

    Args:
        record: As in ``curvature.json``.

    Returns:
        The figure; None when no side has a number.
    """
    sources: Sources = record["sources"]
    sides = [side for side in _SIDES if any(side in source["sides"] for source in sources)]
    if not sides:
        return None
    with themed():
        figure = page(3.7 * len(sides) + 1.6, 5.8)
        panels = figure.subplots(2, len(sides), squeeze=False)
        for column, side in enumerate(sides):
            own = [source for source in sources if side in source["sides"]]
            for axes, key in zip(panels[:, column], ("curvature", "directions"), strict=True):
                _shares(axes, own, [source["label"] for source in sources], side, key)
                axes.set_ylabel("share of the update, %")
                axes.set_xlabel(f"tenth of the {key}", color=INK)
            panels[0, column].set_title(_SIDES[side])
        legend = panels[0, -1].legend if len(panels[0, -1].lines) else panels[0, 0].legend
        legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
        words = "1: the stiffest, 10: the most flexible; means over targets"
        figure.supxlabel(words, fontsize=8.5, color=MUTED, x=0.99, ha="right")
        return finish(figure)


def _shares(axes: Axes, sources: Sources, labels: Sequence[str], side: str, key: str) -> None:
    for source in sources:
        index = labels.index(source["label"])
        shares = source["sides"][side][key]
        axes.plot(
            range(1, len(shares) + 1),
            [100 * share for share in shares],
            color=_COLOURS[index % len(_COLOURS)],
            marker=_SHAPES[index % len(_SHAPES)],
            ms=5.5,
            mec="white",
            lw=1.6,
            label=short(source["label"], 28),
        )
    reference = sources[0]["sides"][side]
    blind = reference["isotropic"] if key == "curvature" else [1 / len(reference[key])] * len(reference[key])
    places, style = range(1, len(blind) + 1), (0, (5, 3))
    axes.plot(places, [100 * share for share in blind], color=INK, lw=1.1, ls=style, label="blind to curvature")
    if key == "curvature":
        axes.axhline(100 / len(blind), color=MUTED, lw=1, ls=":", label="in proportion to it")
    axes.grid(visible=True)
    bare(axes, ("left", "bottom"))
    axes.spines["left"].set_color(RULE)
    if key == "curvature":  # most directions have little curvature: the last tenth holds nearly all of them
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    axes.xaxis.set_major_locator(MaxNLocator(10, integer=True))
