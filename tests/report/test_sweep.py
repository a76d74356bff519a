"""The figure of a sweep says where its points stand and what their numbers are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
from matplotlib.axes import Axes

from keeptune.core.intervals import t_half_width
from keeptune.report.figures.drawing import png
from keeptune.report.figures.sweep_lines import sweep_figure


def row(name: str, x: float | None, seed: int, k: float, method: str = "farss", **more: Any) -> dict[str, Any]:
    facts = {"name": "facts", "role": "knowledge", "metric": "exact_match", "before": 0.9, "after": 0.9 * k}
    topics = {"name": "topics", "role": "task", "metric": "exact_match", "before": 0.1, "after": 0.5}
    benchmarks = [facts | {"n": 9, "interval": [0.9 * k - 1, 0.9 * k - 0.8]}, topics | {"n": 9, "interval": [0.3, 0.5]}]
    scores = {"K": k, "T": None, "KT": None}
    return {"name": name, "x": x, "seed": seed, "method": method, "benchmarks": benchmarks, **scores, **more}


def points_of(axes: Axes, label: str) -> tuple[list[float], list[float]]:
    (line,) = (line for line in axes.lines if line.get_label() == label)
    return numpy.asarray(line.get_xdata()).tolist(), numpy.asarray(line.get_ydata()).tolist()


def sweep(rows: Sequence[dict[str, Any]], axis: str | None = None) -> dict[str, Any]:
    return {"rows": list(rows), "axis": axis, "failed": {}}


def ticks(axes: Axes) -> list[str]:
    return [tick.get_text() for tick in axes.get_xticklabels()]


def test_means_over_seeds_stand_at_their_x_in_order() -> None:
    rows = [row("b", 4, 0, 0.6), row("b", 4, 1, 0.8), row("a", 1, 0, 0.9), row("a", 1, 1, 1.0)]
    figure = sweep_figure(sweep(rows, "method.boundary"))
    assert figure is not None
    scores, accuracies = figure.axes
    xs, ys = points_of(scores, "K")
    assert xs == [1, 4]
    assert ys == pytest.approx([0.95, 0.7])
    assert not any(line.get_label() in ("T", "KT") for line in scores.lines), "they are null"
    assert points_of(accuracies, "facts (keep)")[1] == pytest.approx([0.9 * 0.95, 0.9 * 0.7])
    assert points_of(accuracies, "topics (learn)")[1] == pytest.approx([0.5, 0.5])
    bars = [numpy.asarray(line.get_ydata()).tolist() for line in scores.lines if len(line.get_xdata()) == 2]
    half = t_half_width([0.6, 0.8])
    assert [pytest.approx(0.7 - half), pytest.approx(0.7 + half)] in bars, "the interval over seeds"
    assert accuracies.get_xlabel() == "method.boundary"
    assert ticks(accuracies) == ["1", "4"]


def test_one_seed_shows_the_interval_of_the_items() -> None:
    figure = sweep_figure(sweep([row("a", 1, 0, 1.0), row("b", 2, 0, 0.5)]))
    assert figure is not None
    bars = [numpy.asarray(line.get_ydata()).tolist() for line in figure.axes[1].lines]
    assert pytest.approx([0.8, 1.0]) in bars
    assert pytest.approx([0.35, 0.55]) in bars


def test_full_fine_tuning_without_x_is_a_level_and_other_points_make_categories() -> None:
    rows = [row("a", 1, 0, 1.0), row("b", 2, 0, 0.5), row("full", None, 0, 0.25, method="full")]
    figure = sweep_figure(sweep(rows))
    assert figure is not None
    assert ticks(figure.axes[-1]) == ["1", "2"]
    assert points_of(figure.axes[0], "K")[0] == [1, 2]
    levels = [line for line in figure.axes[0].lines if set(numpy.asarray(line.get_ydata())) == {0.25}]
    assert len(levels) == 1
    rows[2]["method"] = "lora"
    figure = sweep_figure(sweep(rows))
    assert figure is not None
    assert ticks(figure.axes[-1]) == ["a", "b", "full"]
    assert points_of(figure.axes[0], "K") == ([0, 1, 2], [1.0, 0.5, 0.25])


def test_a_baseline_is_a_level_too() -> None:
    rows = [row("a", 1, 0, 1.0), row("b", 2, 0, 0.5), row("plain", None, 0, 0.25, method="lora")]
    figure = sweep_figure(sweep(rows) | {"baseline": "plain"})
    assert figure is not None
    assert ticks(figure.axes[-1]) == ["1", "2"]
    assert any(set(numpy.asarray(line.get_ydata())) == {0.25} for line in figure.axes[0].lines)


@pytest.mark.parametrize(("xs", "scale"), [((8, 16, 256), "log"), ((0, 16, 256), "linear"), ((1, 2, 4), "linear")])
def test_wide_ranges_are_logarithmic(xs: tuple[int, ...], scale: str) -> None:
    figure = sweep_figure(sweep([row(str(x), x, 0, 0.9) for x in xs]))
    assert figure is not None
    assert figure.axes[0].get_xscale() == scale
    assert ticks(figure.axes[-1]) == [f"{x}" for x in xs]


def test_cross_entropies_have_a_panel_of_their_own(tmp_path: Path) -> None:
    rows = [row(f"a long name of a point {n}", None, s, 0.9) for n in range(16) for s in (0, 1)]
    for entry in rows:
        entry["benchmarks"][0] |= {"metric": "cross_entropy"}
    figure = sweep_figure(sweep(rows))
    assert figure is not None
    assert [axes.get_title(loc="left").split()[0] for axes in figure.axes] == ["kept", "accuracy", "cross"]
    png(figure, tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 10_000


def test_nothing_to_draw_is_no_figure() -> None:
    entry = row("a", 1, 0, 0.5) | {"K": None, "benchmarks": []}
    assert sweep_figure(sweep([entry])) is None


def test_titles_name_what_is_drawn_and_what_the_scores_were_taken_after() -> None:
    rows = [row("S-H", None, 0, 0.9), row("S-L", None, 0, 1.0)]
    figure = sweep_figure(sweep(rows) | {"when": "without the nodes"})
    assert figure is not None
    assert [axes.get_title(loc="left") or axes.get_title() for axes in figure.axes] == [
        "kept (K)",
        "accuracy without the nodes",
    ]
