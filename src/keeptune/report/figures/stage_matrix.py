"""A sequence of stages for papers and slides: the matrix stage x benchmark, and the scores over the stages."""

from __future__ import annotations

import numpy
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from keeptune.report.figures import drawing
from keeptune.report.numbers import number, short
from keeptune.report.sequences import Record, own_stage, row_names, score_table, split


def matrix_figure(record: Record) -> Figure:
    """Returns the scores after each stage of ``sequence.json`` as heat maps; a frame marks a task's own stage."""
    parts, names = split(record), row_names(record)
    widths = [len(columns) for _, columns in parts]
    with drawing.themed():
        figure = drawing.page(1.0 * sum(widths) + 2.4, 0.42 * len(names) + 1.1)
        panels = figure.subplots(1, len(parts), squeeze=False, gridspec_kw={"width_ratios": widths})[0]
        for axes, (unit, columns) in zip(panels, parts, strict=True):
            table = numpy.array(score_table(record, columns))
            good = table[numpy.isfinite(table)]
            accuracy = unit == "accuracy"
            norm = Normalize(0.0, 1.0) if accuracy or not good.size else Normalize(good.min(), good.max() + 1e-9)
            drawing.heat_map(axes, table, drawing.colours_of("cool" if accuracy else "warm"), norm, number)
            for x, column in enumerate(columns):
                row = own_stage(record, column)
                if row is not None:
                    corner = (x - 0.49, row - 0.49)
                    axes.add_patch(Rectangle(corner, 0.98, 0.98, fill=False, edgecolor=drawing.INK, lw=1.6))
            axes.set_xticks(range(len(columns)), [short(record["benchmarks"][i]["name"], 14) for i in columns])
            axes.xaxis.tick_top()
            axes.set_yticks(range(len(names)), [short(name, 22) if axes is panels[0] else "" for name in names])
            axes.set_xlabel(unit)
        return drawing.finish(figure)


def stages_figure(record: Record) -> Figure:
    """Returns the scores of each benchmark over the stages, a panel for each unit, from ``sequence.json``."""
    parts, names = split(record), row_names(record)
    with drawing.themed():
        figure = drawing.page(7.4, 3.2 * len(parts))
        panels = figure.subplots(len(parts), 1, squeeze=False)[:, 0]
        for axes, (unit, columns) in zip(panels, parts, strict=True):
            for index, (column, scores) in enumerate(
                zip(columns, zip(*score_table(record, columns), strict=True), strict=True)
            ):
                drawn = drawing.look(index)
                drawing.line(
                    axes, list(enumerate(scores)), drawn, short(record["benchmarks"][column]["name"], 24), ls=drawn.dash
                )
            drawing.frame(axes, "", unit)
            axes.set_xticks(range(len(names)), [short(name, 22) for name in names])
            drawing.legend(axes)
        return drawing.finish(figure)
