"""The page of a sequence of stages: what was learned, what of it was kept, and what it did to the knowledge."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from keeptune.core.errors import ArtefactError
from keeptune.report.bars import Bar, bar
from keeptune.report.comparison_figures import DASHES, save
from keeptune.report.details import Grid
from keeptune.report.heat import cells, short
from keeptune.report.items import lost_and_gained, read_items
from keeptune.report.page import render, write_page
from keeptune.report.repeat import repeat
from keeptune.report.sequence_charts import course, lines, losses, matrices, row_names, split
from keeptune.report.style import INK, bare, finish, look, page, themed
from keeptune.report.wording import count, duration, gap, number, signed

__all__ = ["render_sequence", "write_sequence"]

Record = Mapping[str, Any]
_MEASURES = {
    "average_accuracy": "average accuracy",
    "backward_transfer": "backward transfer",
    "forward_transfer": "forward transfer",
    "forgetting": "forgetting",
}


def write_sequence(record: Record, path: str | os.PathLike[str]) -> None:
    """Write a sequence as one self-contained HTML file, and its figures as PNG and SVG into ``figures`` beside it.

    Args:
        record: As in ``sequence.json``.
        path: The file; its folder must exist.

    Raises:
        ArtefactError: The record lacks a key, or a file cannot be written.
    """
    write_page(render_sequence(record), path)
    save(figures(record), Path(path).parent / "figures")


def render_sequence(record: Record) -> str:
    """Make the page.

    Args:
        record: As in ``sequence.json``.

    Returns:
        The HTML.

    Raises:
        ArtefactError: The record lacks a key.
    """
    try:
        return _render(record)
    except (KeyError, TypeError, IndexError) as error:
        raise ArtefactError(
            "sequence.json",
            got=f"{type(error).__name__}: {error}",
            wanted="the record that keeptune wrote",
            next_step="Run the sequence again; it makes the record anew from the stages that are there.",
        ) from error


def _render(record: Record) -> str:
    maps, over, lost = matrices(record), lines(record), losses(record)
    progress = course(record)
    charts = [*maps, *over, *(chart for chart in (progress, lost) if chart is not None)]
    found = _items(record)
    commands = [("Do it again", str(record["command"]))] if record.get("command") else []
    serve = (record.get("export") or {}).get("serve")
    commands += [("Serve the adapter", str(serve))] if serve else []
    recipes = [(f"Recipe of stage {name}", recipe) for name, recipe in (record.get("recipes") or {}).items()]
    return render(
        "sequence.html.j2",
        charts,
        {"items": found["rows"]} if found else {},
        base=record["base"],
        base_name=Path(str(record["base"])).name or record["base"],
        created=record.get("created"),
        version=record.get("version"),
        said=sentences(record),
        maps=maps,
        over=over,
        progress=progress,
        losses=lost,
        matrix=matrix(record),
        knowledge=knowledge(record),
        each=_each(record),
        stages=stages(record),
        final=final(record),
        adapter=record.get("adapter"),
        found=found,
        repeat=repeat(commands, recipes),
    )


def sentences(record: Record) -> list[str]:
    """Say what the sequence learned and forgot.

    Args:
        record: As in ``sequence.json``.

    Returns:
        Sentences.
    """
    names = [str(stage["name"]) for stage in record["stages"]]
    said = [f"{len(names)} stage{'s' * (len(names) > 1)}, one after the other: {', '.join(names)}."]
    values = {key: record.get(key) for key in _MEASURES}
    if values["average_accuracy"] is not None:
        said.append(f"At the end the tasks have an average accuracy of {number(values['average_accuracy'])}.")
    if values["forgetting"] is not None:
        amount = 100 * values["forgetting"]
        verb = "lost" if amount >= 0 else "gained"
        words = f"Of what each earlier task had reached at its best, {abs(amount):.1f} points were {verb} on average"
        said.append(f"{words} (forgetting {number(values['forgetting'])}).")
    transfers = [
        f"{_MEASURES[key]} {signed(float(value), 3)}"
        for key in ("backward_transfer", "forward_transfer")
        if (value := values[key]) is not None
    ]
    if transfers:
        said.append(f"{' and '.join(transfers).capitalize()}; negative is worse.")
    if record.get("why"):
        said.append(f"Not every measure could be taken: {record['why']}.")
    return said


def matrix(record: Record) -> Grid:
    """Tabulate the scores.

    Args:
        record: As in ``sequence.json``.

    Returns:
        A row for the base and for each stage; a star marks a task's own stage.
    """
    stage_names = [stage["name"] for stage in record["stages"]]
    rows = []
    for index, (name, scores) in enumerate(zip(row_names(record), record["scores"], strict=True)):
        own = [index > 0 and b.get("stage") == stage_names[index - 1] for b in record["benchmarks"]]
        rows.append((name, *(number(score) + (" *" if mine else "") for score, mine in zip(scores, own, strict=True))))
    return Grid(("", *(str(b["name"]) for b in record["benchmarks"])), tuple(rows))


def knowledge(record: Record) -> list[tuple[str, str, str, str, Bar]]:
    """Tabulate what the whole sequence did to the knowledge.

    Args:
        record: As in ``sequence.json``.

    Returns:
        Name, before and after, change, interval, and a bar to the better side; bars of one unit share a scale.
    """
    rows = []
    for index, benchmark in enumerate(record["benchmarks"]):
        before, after = record["scores"][0][index], record["scores"][-1][index]
        if benchmark["role"] != "knowledge" or before is None or after is None:
            continue
        ends = record["intervals"][-1][index] if record.get("intervals") else None
        rows.append((str(benchmark["name"]), benchmark["metric"] == "cross_entropy", before, after, ends))
    found = []
    for name, nats, before, after, ends in rows:
        same = [row for row in rows if row[1] == nats]
        scale = max(abs(v) for row in same for v in (row[3] - row[2], *(row[4] or ()))) or 1.0
        low, high = (math.nan, math.nan) if ends is None else ((-ends[1], -ends[0]) if nats else (ends[0], ends[1]))
        strip = bar((before - after) if nats else (after - before), low, high, scale)
        factor, decimals = (1, 3) if nats else (100, 1)
        told = "" if ends is None else f"[{signed(factor * ends[0], decimals)}, {signed(factor * ends[1], decimals)}]"
        change = signed(factor * (after - before), decimals) + (" nats/token" if nats else " points")
        found.append((name, f"{number(before)} → {number(after)}", change, told, strip))
    return found


def _each(record: Record) -> Grid | None:
    each = record.get("forgetting_of_each") or {}
    if not each:
        return None
    return Grid(
        ("task", "best before, less the end"), tuple((str(name), number(value)) for name, value in each.items())
    )


def stages(record: Record) -> Grid:
    """Tabulate how each stage was made.

    Args:
        record: As in ``sequence.json``.

    Returns:
        A row for each stage.
    """
    heads = ("stage", "method", "seed", "options", "rank so far", "trained", "time", "export gap", "adapter")
    rows = []
    for stage in record["stages"]:
        options = "; ".join(
            f"{key} {value}" for key, value in (stage.get("options") or {}).items() if value is not None
        )
        seconds = stage.get("seconds")
        rows.append(
            (
                *(str(stage[key]) for key in ("name", "method", "seed")),
                options or "–",
                str(stage.get("rank") or "–"),
                count(stage.get("trained_parameters")),
                "–" if seconds is None else duration(float(seconds)),
                gap(stage.get("gap")),
                str(stage.get("adapter") or stage.get("folder") or "–"),
            )
        )
    return Grid(heads, tuple(rows))


def final(record: Record) -> Grid | None:
    """Tabulate the product where it is not what the last stage left.

    Args:
        record: As in ``sequence.json``.

    Returns:
        Last stage and product of each benchmark; None where they are the same.
    """
    if not record.get("final"):
        return None
    last = {b["name"]: score for b, score in zip(record["benchmarks"], record["scores"][-1], strict=True)}
    rows = [(str(row["name"]), number(last.get(row["name"])), number(row["after"])) for row in record["final"]]
    return Grid(("benchmark", "after the last stage", "the product"), tuple(rows))


def _items(record: Record) -> dict[str, Any] | None:
    """Read the items of each stage, which are beside its adapter."""
    results = []
    for stage in record["stages"]:
        folder = stage.get("adapter") or stage.get("folder")
        if folder:
            place = Path(str(folder)).parent
            row = {"name": f"after {stage['name']}", "seed": stage["seed"], "folder": place}
            results += read_items(row | {"benchmarks": record["benchmarks"]})
    return lost_and_gained(results) if results else None


def figures(record: Record) -> dict[str, Figure]:
    """Draw the matrix and the scores over the stages for papers and slides.

    Args:
        record: As in ``sequence.json``.

    Returns:
        Name to figure.
    """
    return {"matrix": _matrix_figure(record), "stages": _stages_figure(record)}


def _matrix_figure(record: Record) -> Figure:
    parts, names = split(record), row_names(record)
    stage_names = [stage["name"] for stage in record["stages"]]
    with themed():
        columns = sum(len(part) for _, part in parts)
        figure = page(1.0 * columns + 2.4, 0.42 * len(names) + 1.1)
        widths = [len(part) for _, part in parts]
        panels = figure.subplots(1, len(parts), squeeze=False, gridspec_kw={"width_ratios": widths})[0]
        for place, (axes, (unit, part)) in enumerate(zip(panels, parts, strict=True)):
            table = numpy.array([[math.nan if row[i] is None else row[i] for i in part] for row in record["scores"]])
            good = table[numpy.isfinite(table)]
            accuracy = unit == "accuracy"
            ends = ("#eef4f9", "#7fb2d9", "#0b5c96") if accuracy else ("#fdf3ec", "#f0a875", "#a63c06")
            low, high = (0.0, 1.0) if accuracy or not good.size else (float(good.min()), float(good.max()) + 1e-9)
            cells(axes, table, LinearSegmentedColormap.from_list("scores", ends), Normalize(low, high), number)
            for x, column in enumerate(part):
                stage = record["benchmarks"][column].get("stage")
                if stage in stage_names:
                    corner = (x - 0.49, 0.51 + stage_names.index(stage))
                    axes.add_patch(Rectangle(corner, 0.98, 0.98, fill=False, edgecolor=INK, lw=1.6))
            axes.set_xticks(range(len(part)), [short(record["benchmarks"][i]["name"], 14) for i in part])
            axes.xaxis.tick_top()
            axes.set_yticks(range(len(names)), [short(name, 22) for name in names] if place == 0 else [""] * len(names))
            axes.set_xlabel(unit)
        return finish(figure)


def _stages_figure(record: Record) -> Figure:
    parts, names = split(record), row_names(record)
    with themed():
        figure = page(7.4, 3.2 * len(parts))
        panels = figure.subplots(len(parts), 1, squeeze=False)[:, 0]
        for axes, (unit, part) in zip(panels, parts, strict=True):
            for index, column in enumerate(part):
                values = [math.nan if row[column] is None else row[column] for row in record["scores"]]
                drawn, dash = look(index), DASHES[index % len(DASHES)]
                label = short(record["benchmarks"][column]["name"], 24)
                axes.plot(values, color=drawn.colour, marker=drawn.shape, ls=dash, lw=1.6, ms=6, label=label)
            axes.set_xticks(range(len(names)), [short(name, 22) for name in names])
            axes.set_ylabel(unit)
            axes.grid(visible=True)
            bare(axes, ("left", "bottom"))
            axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8.5)
        return finish(figure)
