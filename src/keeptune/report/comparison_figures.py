"""The figures of a comparison for papers and slides: PNG and SVG files by matplotlib."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from keeptune.core.artefact import write_bytes
from keeptune.report.comparison_charts import Scales, by_volume, labels_of, ranges
from keeptune.report.heat import short
from keeptune.report.style import INK, MUTED, Look, bare, finish, look, page, png, svg, themed

__all__ = ["DASHES", "hypervolume_figure", "save", "tradeoff_figure", "write_figures"]

DASHES = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (5, 2, 1, 2)), (0, (9, 2)), (0, (9, 2, 1, 2)))


def write_figures(cells: Mapping[str, Any], front: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write what there is to draw.

    Args:
        cells: As in ``runs.json``.
        front: As in ``front.json``.
        folder: Where; it is made.

    Returns:
        The files.
    """
    found = {"tradeoff": tradeoff_figure(cells, front), "hypervolume": hypervolume_figure(cells, front)}
    return save({name: figure for name, figure in found.items() if figure is not None}, folder)


def save(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Write figures as PNG and SVG.

    Args:
        figures: Name to figure.
        folder: Where; it is made.

    Returns:
        The files.
    """
    written = []
    for name, figure in figures.items():
        write_bytes(folder / f"{name}.svg", svg(figure).encode())
        png(figure, folder / f"{name}.png")
        written += [folder / f"{name}.svg", folder / f"{name}.png"]
    return written


def tradeoff_figure(cells: Mapping[str, Any], front: Mapping[str, Any]) -> Figure | None:
    """Draw every setting with the front of each label and of all; up and to the right is better.

    Args:
        cells: As in ``runs.json``.
        front: As in ``front.json``.

    Returns:
        The figure; None without points.
    """
    points = front["points"]
    if not points:
        return None
    scales, numbered = Scales(front), labels_of(cells["runs"], front)
    places = {point["name"]: (point["learned"]["mean"], scales.factor * point["forgotten"]["mean"]) for point in points}
    with themed():
        figure = page(8.6, max(5.2, 0.2 * len(numbered) + 1.4))
        axes = figure.subplots()
        over = sorted(places[name] for name in front["front"] if name in places)
        axes.plot(*zip(*over, strict=True), color="#c9d2da", lw=6, zorder=1, label="front over all")
        for label, index in numbered.items():
            members = [point for point in points if point["label"] == label]
            drawn = look(index)
            line = sorted(places[name] for name in front["fronts"].get(label, []) if name in places)
            if len(line) > 1:
                dash = DASHES[index % len(DASHES)]
                axes.plot(*zip(*line, strict=True), color=drawn.colour, lw=0.9, ls=dash, zorder=2)
            if members:
                _scatter(axes, members, places, drawn, label, scales)
        across, down = ranges(cells["runs"], front, None)
        axes.set_xlim(across)
        axes.set_ylim(down)
        axes.axhline(0, color=MUTED, lw=0.8, ls=(0, (4, 3)), zorder=0)
        axes.set_xlabel(scales.across)
        axes.set_ylabel(scales.up)
        axes.grid(visible=True)
        bare(axes, ("left", "bottom"))
        axes.text(1.0, 1.01, "better ↗", ha="right", va="bottom", fontsize=9, color=MUTED, transform=axes.transAxes)
        axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8.5)
        return finish(figure)


def _scatter(
    axes: Any, members: Sequence[Mapping[str, Any]], places: Mapping[str, Any], drawn: Look, label: str, scales: Scales
) -> None:
    for first, point in enumerate(members):
        x, y = places[point["name"]]
        face = "white" if point.get("variant") else drawn.colour
        axes.scatter(
            [x],
            [y],
            marker=drawn.shape,
            s=52 if point["on_front"] else 26,
            facecolors=face,
            edgecolors=drawn.colour if point.get("variant") else "white",
            linewidths=1.0 if point.get("variant") else 0.6,
            zorder=4,
            label=short(label, 30) if first == 0 else None,
        )
        if point["on_front"]:
            for key, factor in (("learned", 1.0), ("forgotten", scales.factor)):
                low, high = point[key].get("low"), point[key].get("high")
                if low is not None and high is not None:
                    ends = [factor * low, factor * high]
                    line = (ends, [y, y]) if key == "learned" else ([x, x], ends)
                    axes.plot(*line, color=drawn.colour, lw=0.9, alpha=0.7, zorder=3)


def hypervolume_figure(cells: Mapping[str, Any], front: Mapping[str, Any]) -> Figure | None:
    """Draw the hypervolume of each label as a bar, the largest on top.

    Args:
        cells: As in ``runs.json``.
        front: As in ``front.json``.

    Returns:
        The figure; None without hypervolumes.
    """
    found = by_volume(front)
    if not found:
        return None
    numbered = labels_of(cells["runs"], front)
    with themed():
        figure = page(7.0, 0.24 * len(found) + 0.9)
        axes = figure.subplots()
        for place, (label, item) in enumerate(found.items()):
            axes.barh([place], [item["mean"]], height=0.66, color=look(numbered[label]).colour)
            ends = [math.nan if item.get(key) is None else float(item[key]) for key in ("low", "high")]
            axes.plot(ends, [place, place], color=INK, lw=1)
        axes.set_yticks(range(len(found)), [short(label, 30) for label in found])
        axes.set_ylim(len(found) - 0.4, -0.6)
        axes.set_xlim(left=0)
        axes.set_xlabel("hypervolume, 95% intervals over seeds")
        axes.grid(visible=True, axis="x")
        bare(axes)
        return finish(figure)
