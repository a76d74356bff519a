"""A comparison for papers and slides: its trade-off with fronts, and its hypervolumes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from keeptune.report.comparisons import Points, Scales, by_volume, labels_of, ranges
from keeptune.report.figures import drawing
from keeptune.report.numbers import ends, short


def write_figures(runs: Mapping[str, Any], front: Mapping[str, Any], folder: Path) -> list[Path]:
    """Writes the figures of ``runs.json`` and ``front.json`` into a folder, as PNG and SVG, and returns the files."""
    figures = {"tradeoff": tradeoff_figure(runs, front), "hypervolume": hypervolume_figure(runs, front)}
    return drawing.save({name: figure for name, figure in figures.items() if figure is not None}, folder)


def tradeoff_figure(runs: Mapping[str, Any], front: Mapping[str, Any]) -> Figure | None:
    """Returns every setting with the front of each label and of all, as the page has them; None without points."""
    points = front["points"]
    if not points:
        return None
    scales, numbered = Scales(front), labels_of(runs["runs"], front)
    places = {point["name"]: scales.place(point) for point in points}
    with drawing.themed():
        figure = drawing.page(8.6, max(5.2, 0.2 * len(numbered) + 1.4))
        axes = figure.subplots()
        over = sorted(places[name] for name in front["front"] if name in places)
        axes.plot(*zip(*over, strict=True), color="#c9d2da", lw=6, zorder=1, label="front over all")
        for label, index in numbered.items():
            drawn = drawing.look(index)
            line = sorted(places[name] for name in front["fronts"].get(label, []) if name in places)
            if len(line) > 1:
                axes.plot(*zip(*line, strict=True), color=drawn.colour, lw=0.9, ls=drawn.dash, zorder=2)
            _scatter(axes, [point for point in points if point["label"] == label], drawn, label, scales)
        across, down = ranges(runs["runs"], front, None)
        axes.set(xlim=across, ylim=down, xlabel=scales.across, ylabel=scales.up)
        axes.axhline(0, color=drawing.MUTED, lw=0.8, ls=(0, (4, 3)), zorder=0)
        axes.grid(visible=True)
        drawing.bare(axes, ("left", "bottom"))
        axes.text(
            1.0, 1.01, "better ↗", ha="right", va="bottom", fontsize=9, color=drawing.MUTED, transform=axes.transAxes
        )
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8.5)
        return drawing.finish(figure)


def _scatter(axes: Axes, members: Points, drawn: drawing.Look, label: str, scales: Scales) -> None:
    """Draws the settings of a label; those with a variant are hollow, those on the front large and with intervals."""
    for index, point in enumerate(members):
        x, y = scales.place(point)
        variant, on_front = bool(point.get("variant")), bool(point["on_front"])
        face, edge = ("white", drawn.colour) if variant else (drawn.colour, "white")
        style: dict[str, Any] = {
            "marker": drawn.shape,
            "s": 52 if on_front else 26,
            "linewidths": 1.0 if variant else 0.6,
            "zorder": 4,
        }
        name = short(label) if index == 0 else None
        axes.scatter([x], [y], facecolors=face, edgecolors=edge, label=name, **style)
        if on_front:
            thin: dict[str, Any] = {"color": drawn.colour, "lw": 0.9, "alpha": 0.7, "zorder": 3}
            axes.plot(ends(point["learned"]), [y, y], **thin)
            axes.plot([x, x], [scales.factor * end for end in ends(point["forgotten"])], **thin)


def hypervolume_figure(runs: Mapping[str, Any], front: Mapping[str, Any]) -> Figure | None:
    """Returns the hypervolume of each label as a bar, the largest on top; None without hypervolumes."""
    volumes = by_volume(front)
    if not volumes:
        return None
    numbered = labels_of(runs["runs"], front)
    with drawing.themed():
        figure = drawing.page(7.0, 0.24 * len(volumes) + 0.9)
        axes = figure.subplots()
        for place, (label, item) in enumerate(volumes.items()):
            axes.barh([place], [item["mean"]], height=0.66, color=drawing.look(numbered[label]).colour)
            axes.plot(ends(item), [place, place], color=drawing.INK, lw=1)
        axes.set_yticks(range(len(volumes)), [short(label) for label in volumes])
        axes.set_ylim(len(volumes) - 0.4, -0.6)
        axes.set_xlim(left=0)
        axes.set_xlabel("hypervolume, 95% intervals over seeds")
        axes.grid(visible=True, axis="x")
        drawing.bare(axes)
        return drawing.finish(figure)
