"""Put labels next to points so that they hide nothing and do not overlap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.transforms import Bbox

from keeptune.report.style import MANY

__all__ = ["Label", "place", "point_box", "spread"]


@dataclass(frozen=True)
class Label:
    """A text that belongs to a point."""

    x: float
    y: float
    text: str
    colour: str


def point_box(axes: Axes, x: float, y: float, radius: float) -> Bbox:
    """Make the box of a marker in pixels.

    Args:
        axes: The plot, its limits final.
        x: The point.
        y: The point.
        radius: Half the marker's size in pixels.

    Returns:
        The box.
    """
    centre = axes.transData.transform((x, y))
    return Bbox.from_extents(*(centre - radius), *(centre + radius))


def place(axes: Axes, labels: Sequence[Label], taken: Sequence[Bbox]) -> None:
    """Write the labels, each at the free place nearest to its point and to no other.

    Args:
        axes: The plot, its limits and layout final.
        labels: The labels.
        taken: Boxes in pixels that labels should not cover.
    """
    points = [(float(x), float(y)) for x, y in (axes.transData.transform((label.x, label.y)) for label in labels)]
    sizes = [_size(axes, label) for label in labels]
    busy = list(taken)
    for index, label in enumerate(labels):

        def weigh(spot: tuple[float, float], at: int = index) -> float:
            box = _box(axes, points[at], sizes[at], spot)
            return _cost(box, axes, busy) + _far(spot) + _confusion(box, points, at)

        across, up = best = min(_places(), key=weigh)
        box = _box(axes, points[index], sizes[index], best)
        distant = _far(best) > (30 if len(labels) <= MANY else 14)
        distant |= _confusion(box, points, index) > 0
        axes.annotate(
            label.text,
            (label.x, label.y),
            (across, up),
            textcoords="offset points",
            ha=_side(across),
            va="center",
            color=label.colour,
            fontweight="bold",
            fontsize=9.5,
            zorder=6,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": label.colour, "lw": 0.6, "shrinkB": 5} if distant else None,
        )
        busy.append(box)


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Move positions apart until neighbours keep a gap, moving each as little as is simple.

    Args:
        wanted: The positions asked for.
        gap: The least distance.

    Returns:
        The new positions in the same order.
    """
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    clusters: list[list[int]] = []
    for index in order:
        clusters.append([index])
        while len(clusters) > 1 and _bottom(clusters[-1], wanted, gap) < _top(clusters[-2], wanted, gap) + gap:
            last = clusters.pop()
            clusters[-1] += last
    out = [0.0] * len(wanted)
    for cluster in clusters:
        start = _bottom(cluster, wanted, gap)
        for step, index in enumerate(cluster):
            out[index] = start + step * gap
    return out


def _bottom(cluster: Sequence[int], wanted: Sequence[float], gap: float) -> float:
    """Find where a cluster of labels begins.

    Args:
        cluster: The members.
        wanted: The positions asked for.
        gap: The least distance.

    Returns:
        The lowest position of the cluster centred on what its members asked for.
    """
    centre = sum(wanted[index] for index in cluster) / len(cluster)
    return centre - gap * (len(cluster) - 1) / 2


def _top(cluster: Sequence[int], wanted: Sequence[float], gap: float) -> float:
    """Find where a cluster of labels ends.

    Args:
        cluster: The members.
        wanted: The positions asked for.
        gap: The least distance.

    Returns:
        The highest position of the cluster.
    """
    return _bottom(cluster, wanted, gap) + gap * (len(cluster) - 1)


def _places() -> list[tuple[float, float]]:
    """List places around a point in points of type, near ones first.

    Returns:
        Offsets across and up.
    """
    rings = []
    for reach in (11.0, 18.0, 28.0, 42.0, 58.0):
        rings += [(reach, 0.0), (-reach, 0.0), (0.0, reach + 1), (0.0, -reach - 1)]
        rings += [(reach * a, reach * b) for a in (0.7, -0.7) for b in (0.9, -0.9)]
        if reach > 20:
            rings += [(reach * a, reach * b) for a in (0.95, -0.95) for b in (0.45, -0.45)]
    return rings


def _side(across: float) -> str:
    """Choose how a label lines up with its place.

    Args:
        across: The offset across.

    Returns:
        "left", "right" or "center".
    """
    return "center" if across == 0 else "left" if across > 0 else "right"


def _far(spot: tuple[float, float]) -> float:
    """Measure how far a place is from its point.

    Args:
        spot: The offset.

    Returns:
        The distance in points of type.
    """
    return float((spot[0] ** 2 + spot[1] ** 2) ** 0.5)


def _size(axes: Axes, label: Label) -> tuple[float, float]:
    """Measure a label.

    Args:
        axes: The plot.
        label: The label.

    Returns:
        Width and height in pixels.
    """
    probe = axes.text(0, 0, label.text, fontweight="bold", fontsize=9.5)
    size = probe.get_window_extent()
    probe.remove()
    return size.width, size.height


def _box(axes: Axes, point: tuple[float, float], size: tuple[float, float], spot: tuple[float, float]) -> Bbox:
    """Put a label at a place.

    Args:
        axes: The plot.
        point: Its point in pixels.
        size: Its width and height in pixels.
        spot: Its offset in points of type.

    Returns:
        Its box in pixels with a little air.
    """
    figure = axes.get_figure(root=True)
    scale = 1.0 if figure is None else figure.dpi / 72
    x, y = point[0] + spot[0] * scale, point[1] + spot[1] * scale
    left = {"left": x, "right": x - size[0], "center": x - size[0] / 2}[_side(spot[0])]
    return Bbox.from_bounds(left - 2, y - size[1] / 2 - 1, size[0] + 4, size[1] + 2)


def _confusion(box: Bbox, points: Sequence[tuple[float, float]], own: int) -> float:
    """Weigh how easily a label is taken for another point's.

    Args:
        box: The label's box.
        points: All points in pixels.
        own: Which is its own.

    Returns:
        How many pixels nearer another point is than its own; 0 when its own is the nearest.
    """
    gaps = [_gap(box, point) for point in points]
    return max(gaps[own] - min((gap for at, gap in enumerate(gaps) if at != own), default=gaps[own]), 0.0)


def _gap(box: Bbox, point: tuple[float, float]) -> float:
    """Measure how far a point is from a box.

    Args:
        box: The box.
        point: The point.

    Returns:
        The distance, 0 inside.
    """
    across = max(box.x0 - point[0], 0.0, point[0] - box.x1)
    up = max(box.y0 - point[1], 0.0, point[1] - box.y1)
    return float((across**2 + up**2) ** 0.5)


def _cost(box: Bbox, axes: Axes, busy: Sequence[Bbox]) -> float:
    """Weigh how bad a place is.

    Args:
        box: The label's box.
        axes: The plot.
        busy: Boxes already taken.

    Returns:
        The overlapping area in pixels, and a heavy fine for leaving the plot.
    """
    frame = axes.get_window_extent()
    outside = max(frame.x0 - box.x0, 0) + max(box.x1 - frame.x1, 0)
    outside += max(frame.y0 - box.y0, 0) + max(box.y1 - frame.y1, 0)
    covered = 0.0
    for other in busy:
        wide = min(box.x1, other.x1) - max(box.x0, other.x0)
        high = min(box.y1, other.y1) - max(box.y0, other.y0)
        if wide > 0 and high > 0:
            covered += wide * high + 20
    return float(covered + 50 * outside)
