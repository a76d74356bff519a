"""Charts of studies: energy (FARSS Fig. 1), change (L2-LoRA Fig. 6), curvature, tracing, nodes (LoKI Fig. 2)."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, Final

import numpy
import plotly.graph_objects as go

from keeptune.report.estimates import layer_means, totals
from keeptune.report.pages.charts import (
    Chart,
    Placed,
    arms,
    axis,
    categories,
    figure_of,
    heat_map,
    map_chart,
    mark,
    role_map,
    scatter,
)

_READINGS: Final = {
    "positions": "each prompt token restored",
    "diagonal": "the token before each answer token restored",
}
Record = Mapping[str, Any]


def energy_charts(rows: Sequence[Record], top: int, name: str) -> list[Chart]:
    """Returns the share of the energy in the ``top`` singular values by layer, a line for each role and their mean.

    Rows have ``layer``, ``role`` and ``energy``; empty when no target lies in a layer.
    """
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["layer"] >= 0 and row["energy"] is not None:
            lines.setdefault(row["role"], []).append((row["layer"], row["energy"]))
    if not lines:
        return []
    traces = [_line(role, sorted(places), index) for index, (role, places) in enumerate(lines.items())]
    bold = {"line": {"color": "var(--ink)", "width": 4}, "marker": {"color": "var(--ink)", "size": 9}}
    means = layer_means(rows)
    traces.append(_line("mean", list(means.items()), 0, **bold))
    figure = figure_of(traces, _layers(means), axis("share of the sum of squares", rangemode="tozero"))
    return [Chart("energy", f"{name}: energy in the top {top} singular values", figure, 360)]


def change_charts(record: Record) -> list[Chart]:
    """Returns maps of roles and layers of ``change.json``, and their profiles; empty when no target is in a layer."""
    sources = [source for source in record["sources"] if source["layers"]]
    layers = {int(layer) for source in sources for layer in source["layers"]}
    tables: list[Placed] = []
    for source in sources:
        shares = {place: total["relative"] for place, total in totals(source["rows"], "layer", "role").items()}
        tables.append([(*at, None if share is None else 100 * share) for at, share in shares.items() if at[0] >= 0])
    top = max((value for table in tables for *_, value in table if value is not None), default=0.0) or 1.0
    charts: list[Chart] = []
    for place, (source, table) in enumerate(zip(sources, tables, strict=True)):
        words, form = f"{source['label']}: change, % of the weight", f".{int(top < 100)}f"
        more = {"write": lambda value, form=form: f"{value:{form}}", "span": (0.0, top)}
        charts += role_map(f"change{place}", words, table, "warm", "%", **more)
    for measure, scale, words in (("relative", 100, "% of the weights"), ("norm", 1, "norm of the change")):
        lines = []
        for index, source in enumerate(sources):
            values = sorted((int(layer), total[measure]) for layer, total in source["layers"].items())
            places = [(layer, scale * value) for layer, value in values if value is not None]
            lines.append(_line(source["label"], places, index))
        if lines:
            figure = figure_of(lines, _layers(layers), axis(words, rangemode="tozero"))
            charts.append(Chart(measure, f"All roles together: {words}", figure, 260))
    return charts


def curvature_charts(record: Record) -> list[Chart]:
    """Returns the shares of updates by tenths of curvature and directions in ``curvature.json``, two for each side."""
    sources = record["sources"]
    charts = []
    for side in ("input", "output"):
        own = [(index, source["sides"][side]) for index, source in enumerate(sources) if side in source["sides"]]
        for measure in ("curvature", "directions") if own else ():
            lines = [
                _line(
                    sources[index]["label"], [(at, 100 * share) for at, share in enumerate(shares[measure], 1)], index
                )
                for index, shares in own
            ]
            even = [1 / len(own[0][1][measure])] * len(own[0][1][measure])
            rules = [("blind to curvature", "dash", own[0][1]["isotropic"] if measure == "curvature" else even)]
            # Most directions have little curvature: the last tenth holds nearly all of them.
            rules += [("in proportion to it", "dot", even)] if measure == "curvature" else []
            for name, dash, shares in rules:
                line = {"color": "var(--ink)", "dash": dash, "width": 1.5}
                places = [(at, 100 * share) for at, share in enumerate(shares, 1)]
                lines.append(_line(name, places, 0, mode="lines", line=line))
            up = {"type": "log"} if measure == "curvature" else {"rangemode": "tozero"}
            across = axis(f"tenth of the {measure}", dtick=1)
            figure = figure_of(lines, across, axis("share of the update, %", **up))
            charts.append(Chart(f"{side}-{measure}", f"{side.capitalize()} side: {measure}", figure, 300))
    return charts


def trace_charts(record: Record, key: str = "", run: str = "") -> tuple[list[Chart], list[Chart]]:
    """Returns layer profiles, raw and normalised, and a map of tokens by layers for each model, of a ``trace.json``.

    Bars are 95% intervals over texts; models whose effects are not beyond chance have no normalised profile. Names of
    charts begin with ``key``, their captions with the ``run``.
    """
    raw, shares, norm, nothing = [], [], record["norm"], ""
    for index, model in enumerate(record["models"]):
        raw.append(_effects(model["name"], model["AIE"], model["AIE_error"], index))
        if model["distinct"] and model[f"NAIE_{norm}"] is not None:
            shares.append(_effects(model["name"], model[f"NAIE_{norm}"], model[f"NAIE_{norm}_error"], index))
        else:
            nothing += f"; {model['name']}: no effect beyond chance"
    across = _layers(range(len(raw[0].y)))
    damage = f"noise {record['noise']['scale']:g} σ on {record['noise']['fraction']:.0%} of the prompt"
    read = f"{_READINGS[record['reading']]}, block outputs"
    run = f"{run}, " if run else ""
    words = f"{run}average indirect effect (AIE): {read}; {damage}; {record['data']['examples']} texts"
    profiles = [
        Chart(f"{key}aie", words, figure_of(raw, across, axis("probability, summed over the answer")), 360),
        Chart(
            f"{key}naie",
            f"{run}normalised over layers ({norm} = 1){nothing}",
            figure_of(shares, across, axis("NAIE")),
            360,
        ),
    ]
    example = record["example"]
    noised, signs = set(example["noised"]), [w.replace("\n", "⏎").strip(" ") or "␣" for w in example["prompt"]]
    tokens = [f"{word}{'*' if place in noised else ''}" for place, word in enumerate(signs)]
    tables = [numpy.asarray(model["heat"], dtype=float).T for model in record["models"]]
    most = max(float(numpy.abs(table).max()) for table in tables) or 1.0
    maps = []
    for index, (model, table) in enumerate(zip(record["models"], tables, strict=True)):
        axes = ("token", tokens), ("layer", [str(layer) for layer in range(table.shape[1])])
        figure = heat_map(table, axes, "gain", "probability brought back", span=(-most, most))
        words = f"{run}{model['name']}: example {example['number']}, answer “{example['answer'].strip()}”, * got noise"
        maps.append(map_chart(f"{key}heat{index}", words, figure, 20, 40))
    return profiles, maps


def density_charts(record: Record) -> list[Chart]:
    """Returns maps of where the highest and lowest nodes of ``suppress.json`` lie, and how much each MLP carries."""
    density, layers = record["density"], [str(layer) for layer in record["layers"]]
    tables = [numpy.asarray(density[name], dtype=float) for name in ("highest", "lowest")]
    columns = [f"{a}" if b - a == 1 else f"{a}–{b - 1}" for a, b in pairwise(density["edges"])]
    charts = []
    # A single text among thousands would take most of the scale.
    least = float(numpy.concatenate(tables).max()) / 1e3
    for name, table, scale in zip(("highest", "lowest"), tables, ("warm", "cool"), strict=True):
        axes = ("layer", layers), ("node", columns)
        figure = heat_map(
            table, axes, scale, "texts that name a node", lambda share: f"{100 * share:.3g}%", least=least
        )
        charts.append(map_chart(name, f"{name} {density['q']:g}% of all nodes", figure))
    bars = go.Bar(x=list(range(len(layers))), y=record["profile"], marker={"color": "var(--cool1)"})
    figure = figure_of([bars], axis("layer", **categories(layers, 30)), axis("∑|attribution|, largest = 1"))
    return [*charts, Chart("profile", "How much each MLP carries", figure, 240)]


def overlap_charts(record: Record) -> list[Chart]:
    """Returns the share of common rows of each block, beside what chance would give, from ``overlap.json``."""
    rows = record["by_layer"]
    names = [f"{row['layer']}" if row["share"] is not None else f"{row['layer']}: none" for row in rows]
    places = list(range(len(rows)))
    bars = go.Bar(x=places, y=[row["share"] or 0.0 for row in rows], marker={"color": "var(--cool1)"})
    look = {"size": 9, "color": "var(--ink)"}
    chance = scatter("by chance", places, [row["chance"] for row in rows], mark(0), "markers", marker=look)
    up = axis("share of the selected rows", range=[0, 1])
    figure = figure_of([bars, chance], axis("layer", **categories(names, 30)), up)
    words = f"Common rows of {record['first']['name']} and {record['second']['name']}; dots: by chance"
    return [Chart("overlap", words, figure, 300)]


def _line(label: str, places: Sequence[tuple[float, float]], index: int, **more: Any) -> go.Scatter:
    return scatter(label, [x for x, _ in places], [y for _, y in places], mark(index), **more)


def _effects(name: str, values: Sequence[float], errors: Sequence[float | None], index: int) -> go.Scatter:
    halves = [1.96 * (error or 0.0) for error in errors]
    ends = [(value - half, value + half) for value, half in zip(values, halves, strict=True)]
    return scatter(name, range(len(values)), values, mark(index), error_y=arms(values, ends, mark(index).colour))


def _layers(layers: Any) -> dict[str, Any]:
    return axis("layer", dtick=max(len(layers) // 12, 1), range=[min(layers) - 0.5, max(layers) + 0.5])
