"""How far training moved each weight: a map of roles and layers for each model, and profiles (L2-LoRA Fig. 6)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console

from keeptune.report.grid import print_grid
from keeptune.report.heat import cells, short
from keeptune.report.style import INK, MUTED, bare, finish, page, themed

__all__ = ["change_figure", "print_change", "totals"]

_COLOURS: Final = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#b07c00", "#3a87b8", "#7a7a7a", "#8c4a2f")
_SHAPES: Final = ("o", "s", "^", "D", "v", "P", "X", "h")
_NUMBERED: Final = 16  # layers up to which cells hold numbers
Rows = Sequence[Mapping[str, Any]]


def totals(rows: Rows, key: str) -> dict[str, dict[str, float | None]]:
    """Put the changes of targets together: ``norm = sqrt(sum ||dW||²)``, relative to ``sqrt(sum ||W||²)``.

    Args:
        rows: ``layer``, ``role``, ``norm`` and ``weight`` of each target; of layers, what is in no block is left out.
        key: ``"layer"`` or ``"role"``.

    Returns:
        Layer or role to ``norm``, ``weight`` and ``relative`` (None where the weights are zero).
    """
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        if key != "layer" or row["layer"] >= 0:
            groups.setdefault(row[key], []).append(row)
    ordered = sorted(groups) if key == "layer" else groups
    return {str(name): _total(groups[name]) for name in ordered}


def print_change(record: Mapping[str, Any], console: Console) -> None:
    """Print the relative change, in percent, by layer and role, of one model after the other.

    Args:
        record: ``sources``, as in ``change.json``.
        console: Where to print.
    """
    for source in record["sources"]:
        texts: dict[tuple[int | None, str], list[str]] = {}
        for (layer, role), total in _places(source["rows"]).items():
            texts[layer, role] = [_percent(total["relative"])]
        texts |= {(int(layer), "all"): [_percent(total["relative"])] for layer, total in source["layers"].items()}
        console.print(f"\n{source['label']}: change relative to the weights, %", markup=False, soft_wrap=True)
        print_grid(texts, console)


def change_figure(record: Mapping[str, Any]) -> Figure | None:
    """Draw a heat map of roles and layers for each model, in one scale, and the profiles of all below.

    Args:
        record: ``sources``, as in ``change.json``.

    Returns:
        The figure; None when no target lies in a block.
    """
    sources = [source for source in record["sources"] if source["layers"]]
    layers = sorted({int(layer) for source in sources for layer in source["layers"]})
    if not layers:
        return None
    roles = list(dict.fromkeys(row["role"] for source in sources for row in source["rows"] if row["layer"] >= 0))
    tables = [_table(source["rows"], roles, layers) for source in sources]
    top = max(float(numpy.nanmax(table, initial=0.0)) for table in tables) or 1.0
    row = min(0.26, 6.0 / len(roles))
    heights = [row * len(roles) + 0.35] * len(sources) + [1.7, 1.7]
    with themed():
        figure = page(min(max(0.5 * len(layers) + 2.6, 6.0), 10.0), sum(heights) + 0.6)
        panels = figure.subplots(len(heights), 1, gridspec_kw={"height_ratios": heights})
        norm, colours = (
            Normalize(0, top),
            LinearSegmentedColormap.from_list("change", ["#f4f6f8", "#f0a875", "#a63c06"]),
        )
        write = (lambda value: f"{value:.1f}" if top < 100 else f"{value:.0f}") if len(layers) <= _NUMBERED else None
        for axes, source, table in zip(panels, sources, tables, strict=False):
            cells(axes, table, colours, norm, write if row >= 0.2 else None)
            axes.set_title(f"{short(source['label'], 60)}: change, % of the weight")
            step = max(math.ceil(0.16 / row), 1)
            axes.set_yticks(list(range(0, len(roles), step)), [short(role, 18) for role in roles[::step]])
            _layer_ticks(axes, layers)
        if write is None or row < 0.2:
            bar = figure.colorbar(ScalarMappable(norm, colours), ax=list(panels[: len(sources)]), aspect=24, pad=0.02)
            bar.set_label("%")
            bar.outline.set_visible(False)
        _profile(panels[-2], sources, layers, "relative", "% of the weights")
        _profile(panels[-1], sources, layers, "norm", "norm of the change")
        panels[-2].set_title("all roles together")
        if len(sources) > 1:
            panels[-2].legend(frameon=False, fontsize=9, labelcolor="linecolor", loc="best")
        panels[-1].set_xlabel("layer", color=INK)
        return finish(figure)


def _total(rows: Rows) -> dict[str, float | None]:
    norm = math.sqrt(math.fsum(row["norm"] ** 2 for row in rows))
    weight = math.sqrt(math.fsum(row["weight"] ** 2 for row in rows))
    return {"norm": norm, "weight": weight, "relative": norm / weight if weight > 0 else None}


def _places(rows: Rows) -> dict[tuple[int | None, str], dict[str, float | None]]:
    """Put targets of one layer and role (experts) together."""
    groups: dict[tuple[int | None, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["layer"], row["role"]), []).append(row)
    return {place: _total(own) for place, own in groups.items()}


def _table(rows: Rows, roles: Sequence[str], layers: Sequence[int]) -> numpy.ndarray:
    table = numpy.full((len(roles), len(layers)), math.nan)
    for (layer, role), total in _places(rows).items():
        if layer in layers and total["relative"] is not None:
            table[roles.index(role), layers.index(layer)] = 100 * total["relative"]
    return table


def _profile(axes: Axes, sources: Rows, layers: Sequence[int], key: str, name: str) -> None:
    scale = 100.0 if key == "relative" else 1.0
    for index, source in enumerate(sources):
        places = sorted((int(layer), total[key]) for layer, total in source["layers"].items() if total[key] is not None)
        axes.plot(
            [layers.index(layer) for layer, _ in places],
            [scale * value for _, value in places],
            color=_COLOURS[index % len(_COLOURS)],
            marker=_SHAPES[index % len(_SHAPES)],
            ms=5.5,
            mec="white",
            lw=1.6,
            label=short(source["label"], 40),
        )
    axes.set_xlim(-0.5, len(layers) - 0.5)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(name)
    axes.grid(visible=True)
    bare(axes, ("left", "bottom"))
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    _layer_ticks(axes, layers)
    axes.tick_params(colors=MUTED)


def _layer_ticks(axes: Axes, layers: Sequence[int]) -> None:
    step = max(math.ceil(len(layers) / 24), 1)
    axes.set_xticks(list(range(0, len(layers), step)), [str(layer) for layer in layers[::step]])


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"
