"""The figures of causal tracing: layer profiles (L2-LoRA Fig. 3), and a heat map of tokens by layers (Fig. 2)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console

from keeptune.report.grid import table_frame
from keeptune.report.heat import cells, short
from keeptune.report.style import INK, bare, diverging, finish, page, themed

__all__ = ["heat_figure", "print_trace", "profile_figure"]

_COLOURS: Final = ("#0072b2", "#d55e00")
_SHAPES: Final = ("o", "s")
_KINDS: Final = {"block": "block outputs", "attention": "attention outputs", "mlp": "MLP outputs"}


def profile_figure(record: Mapping[str, Any]) -> Figure:
    """Plot the effect of each layer, raw and normalised, with 95% intervals over texts.

    Args:
        record: As in ``trace.json``.

    Returns:
        The figure.
    """
    norm = record["norm"]
    with themed():
        figure = page(8.4, 3.6)
        left, right = figure.subplots(1, 2)
        for place, model in enumerate(record["models"]):
            style = {"color": _COLOURS[place % 2], "marker": _SHAPES[place % 2]}
            _profile(left, model["AIE"], model["AIE_error"], name := short(model["name"], 28), style)
            shares = model[f"NAIE_{norm}"]
            if shares is not None and model["distinct"]:
                _profile(right, shares, model[f"NAIE_{norm}_error"], name, style)
            else:
                told = f"{name}: no effect beyond chance"
                right.text(0.04, 0.06 + 0.08 * place, told, transform=right.transAxes, color=style["color"])
        left.axhline(0, color=INK, lw=0.8)
        left.set_title("average indirect effect (AIE)")
        left.set_ylabel("probability, summed over the answer")
        right.set_title(f"normalised over layers (NAIE, {norm} = 1)")
        right.set_ylabel("NAIE")
        for axes in (left, right):
            axes.set_xlabel("layer")
            axes.grid(visible=True)
            bare(axes, ("left", "bottom"))
            axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
            axes.margins(x=0.04)
        right.set_ylim(bottom=0)
        left.legend(loc="best", frameon=False, fontsize=9, labelcolor="linecolor")
        figure.suptitle(_what(record), x=0.01, ha="left", fontsize=9.5, color=INK)
        return finish(figure)


def heat_figure(record: Mapping[str, Any]) -> Figure:
    """Draw the effect of each layer at each token of one prompt, a panel for each model, in one scale of colours.

    Args:
        record: As in ``trace.json``; a star marks the tokens that got noise.

    Returns:
        The figure.
    """
    example = record["example"]
    noised = set(example["noised"])
    words = [f"{_word(word)}{'*' if place in noised else ''}" for place, word in enumerate(example["prompt"])]
    tables = [numpy.asarray(model["heat"]).T for model in record["models"]]
    most = max(float(numpy.abs(table).max()) for table in tables) or 1.0
    scale, colours = Normalize(-most, most), diverging().reversed()
    tokens, layers = tables[0].shape
    with themed():
        row, cell = min(0.24, 18.0 / tokens), min(0.5, 4.0 / layers)
        room = 0.075 * max(map(len, words)) + 0.3
        figure = page(
            max(room + len(tables) * (cell * layers + 0.25) + 1.1, 4.2 + 1.4 * (len(tables) - 1)), row * tokens + 1.5
        )
        panels = figure.subplots(1, len(tables), squeeze=False, sharey=True)[0]
        for axes, table, model in zip(panels, tables, record["models"], strict=True):
            cells(axes, table, colours, scale, None)
            axes.set_title(short(model["name"], max(int(cell * layers * 9), 12)), fontsize=9.5)
            _number_layers(axes, layers, cell)
            axes.set_xlabel("layer")
        stride = max(math.ceil(0.13 / row), 1)
        panels[0].set_yticks(list(range(0, tokens, stride)), [words[place] for place in range(0, tokens, stride)])
        bar = figure.colorbar(
            ScalarMappable(scale, colours), ax=list(panels), pad=0.03, aspect=max(row * tokens * 5, 8)
        )
        bar.set_label("probability of the answer brought back")
        bar.outline.set_visible(False)
        bar.ax.set_ylim(min(0.0, *(float(table.min()) for table in tables)), most)
        figure.suptitle(
            f"example {example['number']}, answer “{short(_word(example['answer']), 40)}”\n* tokens that got noise",
            x=0.01,
            ha="left",
            fontsize=9.5,
            color=INK,
        )
        return finish(figure)


def print_trace(record: Mapping[str, Any], console: Console) -> None:
    """Print a row for each layer.

    Args:
        record: As in ``trace.json``.
        console: Where to print.
    """
    table = table_frame()
    table.add_column("layer", justify="right")
    for model in record["models"]:
        table.add_column(f"{short(model['name'], 24)}: AIE", justify="right")
        table.add_column("NAIE", justify="right")
    for layer in range(len(record["models"][0]["AIE"])):
        row = [str(layer)]
        for model in record["models"]:
            error, shares = model["AIE_error"][layer], model[f"NAIE_{record['norm']}"]
            row.append(f"{model['AIE'][layer]:.4f}" + ("" if error is None else f" ± {1.96 * error:.4f}"))
            row.append("–" if shares is None else f"{shares[layer]:.3f}")
        table.add_row(*row)
    console.print(table)
    for model in record["models"]:
        clean, left = model["clean"], model["corrupted"]
        told = f"{model['name']}: the answer's probability is {clean:.3f}, with noise {left:.3f}"
        chance = "" if model["distinct"] else "; no layer's effect stands out of the spread over texts"
        console.print(told + chance, markup=False)
    console.print("AIE: probability brought back, ± half the 95% interval; probabilities are summed over answer tokens")


def _profile(
    axes: Axes, values: Sequence[float], errors: Sequence[float | None], name: str, style: Mapping[str, Any]
) -> None:
    middle = numpy.asarray(values)
    wide = 1.96 * numpy.asarray([math.nan if error is None else error for error in errors])
    layers = numpy.arange(len(middle))
    if numpy.isfinite(wide).all():
        axes.fill_between(layers, middle - wide, middle + wide, color=style["color"], alpha=0.15, lw=0)
    axes.plot(layers, middle, label=name, lw=1.8, ms=5, mec="white", **style)


def _what(record: Mapping[str, Any]) -> str:
    noise, kind = record["noise"], _KINDS[record["kind"]]
    window = "" if record["window"] == 1 else f", {record['window']} layers together"
    read = {"positions": "each prompt token restored", "diagonal": "the token before each answer token restored"}
    damage = f"noise {noise['scale']:g} σ on {noise['fraction']:.0%} of the prompt"
    return f"{read[record['reading']]}, {kind}{window} · {damage} · {record['data']['examples']} texts"


def _number_layers(axes: Axes, layers: int, cell: float) -> None:
    stride = max(math.ceil(0.22 / cell), 1)
    axes.set_xticks(list(range(0, layers, stride)), [str(layer) for layer in range(0, layers, stride)])


def _word(text: str) -> str:
    """Make a token visible: what stands for a blank at its ends, and line ends."""
    return text.replace("\n", "⏎").strip(" ") or "␣"
