"""The figure of a sweep says where its points stand and what their numbers are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from keeptune.core.intervals import t_half_width
from keeptune.report.pages.charts import Chart
from keeptune.report.pages.sweep_charts import sweep_charts


def row(name: str, x: float | None, seed: int, k: float, method: str = "farss", **more: Any) -> dict[str, Any]:
    facts = {"name": "facts", "role": "knowledge", "metric": "exact_match", "before": 0.9, "after": 0.9 * k}
    topics = {"name": "topics", "role": "task", "metric": "exact_match", "before": 0.1, "after": 0.5}
    benchmarks = [facts | {"n": 9, "interval": [0.9 * k - 1, 0.9 * k - 0.8]}, topics | {"n": 9, "interval": [0.3, 0.5]}]
    scores = {"K": k, "T": None, "KT": None}
    return {"name": name, "x": x, "seed": seed, "method": method, "benchmarks": benchmarks, **scores, **more}


def points_of(chart: Chart, label: str) -> tuple[list[float], list[float]]:
    (line,) = (line for line in chart.figure.data if line.name == label and line.showlegend is None)
    return list(line.x), list(line.y)


def bars(chart: Chart) -> list[list[float]]:
    drawn = [zip(t.y, t.error_y.arrayminus, t.error_y.array, strict=True) for t in chart.figure.data if t.error_y.array]
    return [[y - down, y + up] for own in drawn for y, down, up in own]


def sweep(rows: Sequence[dict[str, Any]], axis: str | None = None) -> dict[str, Any]:
    return {"rows": list(rows), "axis": axis, "failed": {}}


def ticks(chart: Chart) -> list[str]:
    return list(chart.figure.layout.xaxis.ticktext)


def levels(chart: Chart) -> list[float]:
    return [shape.y0 for shape in chart.figure.layout.shapes if shape.line.dash == "dash"]


def test_means_over_seeds_stand_at_their_x_in_order() -> None:
    rows = [row("b", 4, 0, 0.6), row("b", 4, 1, 0.8), row("a", 1, 0, 0.9), row("a", 1, 1, 1.0)]
    scores, accuracies = sweep_charts(sweep(rows, "method.boundary"))
    xs, ys = points_of(scores, "K")
    assert xs == [1, 4]
    assert ys == pytest.approx([0.95, 0.7])
    assert {line.name for line in scores.figure.data} == {"K"}, "T and KT are null"
    assert points_of(accuracies, "facts (keep)")[1] == pytest.approx([0.9 * 0.95, 0.9 * 0.7])
    assert points_of(accuracies, "topics (learn)")[1] == pytest.approx([0.5, 0.5])
    half = t_half_width([0.6, 0.8])
    assert pytest.approx([0.7 - half, 0.7 + half]) in bars(scores), "the interval over seeds"
    assert accuracies.figure.layout.xaxis.title.text == "method.boundary"
    assert ticks(accuracies) == ["1", "4"]


def test_one_seed_shows_the_interval_of_the_items() -> None:
    drawn = bars(sweep_charts(sweep([row("a", 1, 0, 1.0), row("b", 2, 0, 0.5)]))[1])
    assert pytest.approx([0.8, 1.0]) in drawn
    assert pytest.approx([0.35, 0.55]) in drawn


@pytest.mark.parametrize(("method", "baseline"), [("full", None), ("lora", "plain")])
def test_full_fine_tuning_and_the_baseline_without_x_are_levels(method: str, baseline: str | None) -> None:
    rows = [row("a", 1, 0, 1.0), row("b", 2, 0, 0.5), row("plain", None, 0, 0.25, method=method)]
    charts = sweep_charts(sweep(rows) | {"baseline": baseline})
    assert ticks(charts[-1]) == ["1", "2"]
    assert points_of(charts[0], "K")[0] == [1, 2]
    assert levels(charts[0]) == [0.25]


def test_all_layers_of_a_study_are_a_level() -> None:
    rows = [row("layer 0", 0, 0, 0.5), row("layer 1", 1, 0, 0.7), row("layers 0-1", None, 0, 0.6)]
    chart = sweep_charts(sweep(rows, axis="layer") | {"study": "single"})[0]
    assert list(chart.figure.data[-1].x) == [0, 1]
    assert 0.6 in levels(chart)


def test_other_points_without_x_make_categories() -> None:
    charts = sweep_charts(sweep([row("a", 1, 0, 1.0), row("b", 2, 0, 0.5), row("c", None, 0, 0.25, method="lora")]))
    assert ticks(charts[-1]) == ["a", "b", "c"]
    assert points_of(charts[0], "K") == ([0, 1, 2], [1.0, 0.5, 0.25])


@pytest.mark.parametrize(("xs", "scale"), [((8, 16, 256), "log"), ((0, 16, 256), None), ((1, 2, 4), None)])
def test_wide_ranges_are_logarithmic(xs: tuple[int, ...], scale: str | None) -> None:
    charts = sweep_charts(sweep([row(str(x), x, 0, 0.9) for x in xs]))
    assert charts[0].figure.layout.xaxis.type == scale
    assert ticks(charts[-1]) == [f"{x}" for x in xs]


def test_cross_entropies_have_a_panel_of_their_own() -> None:
    rows = [row(f"point {n}", None, s, 0.9) for n in range(16) for s in (0, 1)]
    for entry in rows:
        entry["benchmarks"][0] |= {"metric": "cross_entropy"}
    assert [chart.alt.split()[0] for chart in sweep_charts(sweep(rows))] == ["kept", "accuracy", "cross"]


def test_nothing_to_draw_is_no_chart() -> None:
    entry = row("a", 1, 0, 0.5) | {"K": None, "benchmarks": []}
    assert sweep_charts(sweep([entry])) == []


def test_titles_name_what_is_drawn_and_what_the_scores_were_taken_after() -> None:
    rows = [row("S-H", None, 0, 0.9), row("S-L", None, 0, 1.0)]
    charts = sweep_charts(sweep(rows) | {"when": "without the nodes"})
    assert [chart.alt for chart in charts] == ["kept (K)", "accuracy without the nodes"]
