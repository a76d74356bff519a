"""The figures of causal tracing: layer profiles (L2-LoRA Fig. 3), and a heat map of tokens by layers (Fig. 2)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from keeptune.report.figures import drawing
from keeptune.report.numbers import short

_KINDS: Final = {"block": "block outputs", "attention": "attention outputs", "mlp": "MLP outputs"}
_READINGS: Final = {
    "positions": "each prompt token restored",
    "diagonal": "the token before each answer token restored",
}


def profile_figure(record: Mapping[str, Any]) -> Figure:
    """Returns the effect of each layer, raw and normalised, with 95% intervals over texts, from ``trace.json``."""
    norm = record["norm"]
    with drawing.themed():
        figure = drawing.page(8.4, 3.6)
        left, right = figure.subplots(1, 2)
        for place, model in enumerate(record["models"]):
            drawn, name = drawing.look(place), short(model["name"], 28)
            _profile(left, model["AIE"], model["AIE_error"], name, drawn)
            shares = model[f"NAIE_{norm}"]
            if shares is not None and model["distinct"]:
                _profile(right, shares, model[f"NAIE_{norm}_error"], name, drawn)
            else:
                text = f"{name}: no effect beyond chance"
                right.text(0.04, 0.06 + 0.08 * place, text, transform=right.transAxes, color=drawn.colour)
        left.axhline(0, color=drawing.INK, lw=0.8)
        left.set_title("average indirect effect (AIE)")
        right.set_title(f"normalised over layers (NAIE, {norm} = 1)")
        drawing.frame(left, "layer", "probability, summed over the answer", layers=True)
        drawing.frame(right, "layer", "NAIE", layers=True)
        right.set_ylim(bottom=0)
        left.legend(loc="best", labelcolor="linecolor")
        figure.suptitle(_what(record), x=0.01, ha="left", fontsize=9.5, color=drawing.INK)
        return drawing.finish(figure)


def heat_figure(record: Mapping[str, Any]) -> Figure:
    """Returns the effect of each layer at each token of the prompt in ``trace.json``, models in one scale."""
    example = record["example"]
    noised = set(example["noised"])
    words = [f"{_word(word)}{'*' if place in noised else ''}" for place, word in enumerate(example["prompt"])]
    tables = [numpy.asarray(model["heat"]).T for model in record["models"]]
    most = max(float(numpy.abs(table).max()) for table in tables) or 1.0
    scale, colours = Normalize(-most, most), drawing.colours_of("gains")
    tokens, layers = tables[0].shape
    with drawing.themed():
        row, cell = min(0.24, 18.0 / tokens), min(0.5, 4.0 / layers)
        wide = 0.075 * max(map(len, words)) + 1.4 + len(tables) * (cell * layers + 0.25)
        figure = drawing.page(max(wide, 2.8 + 1.4 * len(tables)), row * tokens + 1.5)
        panels = figure.subplots(1, len(tables), squeeze=False, sharey=True)[0]
        for axes, table, model in zip(panels, tables, record["models"], strict=True):
            drawing.heat_map(axes, table, colours, scale, None)
            axes.set_title(short(model["name"], max(int(cell * layers * 9), 12)), fontsize=9.5)
            drawing.layer_ticks(axes.set_xticks, range(layers), cell)
            axes.set_xlabel("layer")
        drawing.layer_ticks(panels[0].set_yticks, words, row, 0.13)
        bar = drawing.key(figure, list(panels), colours, scale, "probability brought back")
        bar.ax.set_ylim(min(0.0, *(float(table.min()) for table in tables)), most)
        answer = short(_word(example["answer"]), 40)
        title = f"example {example['number']}, answer “{answer}”\n* tokens that got noise"
        figure.suptitle(title, x=0.01, ha="left", fontsize=9.5, color=drawing.INK)
        return drawing.finish(figure)


def _profile(
    axes: Axes, values: Sequence[float], errors: Sequence[float | None], name: str, drawn: drawing.Look
) -> None:
    middle = numpy.asarray(values)
    wide = 1.96 * numpy.asarray([math.nan if error is None else error for error in errors])
    if numpy.isfinite(wide).all():
        layers = numpy.arange(len(middle))
        axes.fill_between(layers, middle - wide, middle + wide, color=drawn.colour, alpha=0.15, lw=0)
    drawing.line(axes, list(enumerate(values)), drawn, name)


def _what(record: Mapping[str, Any]) -> str:
    noise = record["noise"]
    window = "" if record["window"] == 1 else f", {record['window']} layers together"
    damage = f"noise {noise['scale']:g} σ on {noise['fraction']:.0%} of the prompt"
    read = f"{_READINGS[record['reading']]}, {_KINDS[record['kind']]}{window}"
    return f"{read} · {damage} · {record['data']['examples']} texts"


def _word(text: str) -> str:
    """Returns a token made visible: a sign for a blank and for line ends."""
    return text.replace("\n", "⏎").strip(" ") or "␣"
