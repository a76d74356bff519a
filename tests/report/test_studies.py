"""Figures and tables of studies over layers say what each layer gained and cost."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from keeptune.experiments.effects import study_rows
from keeptune.report.pages.charts import Chart
from keeptune.report.pages.sweep_charts import study_charts
from keeptune.report.tables.analyses import print_study


def run(name: str, x: float | None, seed: int, facts: float, topics: float, text: float = 2.5) -> dict[str, Any]:
    def benchmark(name: str, role: str, metric: str, before: float, after: float) -> dict[str, Any]:
        change = after - before
        kind = {"name": name, "role": role, "metric": metric, "n": 9}
        return kind | {"before": before, "after": after, "interval": [change - 0.02, change + 0.04]}

    benchmarks = [
        benchmark("facts", "knowledge", "exact_match", 0.9, facts),
        benchmark("topics", "task", "exact_match", 0.1, topics),
        benchmark("text", "knowledge", "cross_entropy", 2.0, text),
    ]
    return {"name": name, "x": x, "seed": seed, "benchmarks": benchmarks}


def study(kind: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    record = {"study": kind, "layers": [0, 1], "axis": "layer", "rows": rows, "failed": {}}
    return record | {"summary": study_rows(record)}


SINGLE = [run("layer 0", 0, 0, 0.5, 0.2), run("layer 1", 1, 0, 0.8, 0.6), run("layers 0-1", None, 0, 0.4, 0.7)]


def row_of(record: dict[str, Any], point: str, benchmark: str) -> dict[str, Any]:
    (found,) = (r for r in record["summary"] if (r["point"], r["benchmark"]) == (point, benchmark))
    return dict(found)


def line_of(chart: Chart, label: str) -> tuple[list[float], list[float]]:
    (line,) = (line for line in chart.figure.data if line.name.startswith(label))
    return list(line.x), list(line.y)


def bars(chart: Chart) -> list[list[float]]:
    drawn = [zip(t.y, t.error_y.arrayminus, t.error_y.array, strict=True) for t in chart.figure.data if t.error_y.array]
    return [[y - down, y + up] for own in drawn for y, down, up in own if up]


def test_gains_and_drops_are_positive_when_something_was_gained_and_lost() -> None:
    record = study("single", SINGLE)
    facts, topics, text = (row_of(record, "layer 0", name) for name in ("facts", "topics", "text"))
    assert [(r["measure"], r["unit"]) for r in (facts, topics, text)] == [
        ("drop", "points"),
        ("gain", "points"),
        ("drop", "nats"),
    ]
    assert (facts["mean"], facts["low"], facts["high"]) == pytest.approx((40, 36, 42))
    assert (topics["mean"], topics["low"], topics["high"]) == pytest.approx((10, 8, 14))
    assert (text["mean"], text["low"], text["high"]) == pytest.approx((0.5, 0.48, 0.54))


def test_seeds_are_averaged_and_widen_the_interval() -> None:
    rows = [run("layer 0", 0, 0, 0.5, 0.2), run("layer 0", 0, 1, 0.7, 0.2)]
    facts = row_of(study("single", rows), "layer 0", "facts")
    assert facts["mean"] == pytest.approx(30)
    assert facts["after"] == pytest.approx(0.6)
    assert facts["seeds"] == [0, 1]
    half = 12.706 * 10  # t with one degree of freedom, times the standard error of 20 and 40
    assert (facts["low"], facts["high"]) == pytest.approx((30 - half, 30 + half), rel=1e-3)


def test_single_draws_gains_and_drops_by_layer_and_all_layers_as_a_level() -> None:
    points, nats = study_charts(study("single", list(reversed(SINGLE))))
    assert line_of(points, "topics: gain") == ([0, 1], pytest.approx([10, 50]))
    assert line_of(points, "facts: drop") == ([0, 1], pytest.approx([40, 10]))
    assert line_of(nats, "text: drop") == ([0, 1], pytest.approx([0.5, 0.5]))
    assert {round(shape.y0, 6) for shape in points.figure.layout.shapes if shape.line.dash == "dash"} == {50.0, 60.0}
    assert pytest.approx([36, 42]) in bars(points)


@pytest.mark.parametrize("kind", ["bottom", "top"])
def test_nested_studies_draw_scores_from_the_base_on(kind: str) -> None:
    rows = [run("a", 1, 0, 0.5, 0.2), run("b", 2, 0, 0.8, 0.6)]
    accuracy, nats = study_charts(study(kind, rows))
    assert line_of(accuracy, "facts (keep)") == ([0, 1, 2], pytest.approx([90, 50, 80]))
    assert line_of(accuracy, "topics (learn)") == ([0, 1, 2], pytest.approx([10, 20, 60]))
    assert line_of(nats, "text (keep)") == ([0, 1, 2], pytest.approx([2, 2.5, 2.5]))
    # The change is -40 points within [-42, -36], so the score is 50 within [48, 54].
    assert pytest.approx([48, 54]) in bars(accuracy)
    assert pytest.approx([18, 24]) in bars(accuracy)
    assert pytest.approx([2.48, 2.54]) in bars(nats)


def printed(record: dict[str, Any]) -> list[str]:
    console = Console(file=io.StringIO(), width=150)
    print_study(record, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_the_table_has_a_row_for_each_cell() -> None:
    lines = printed(study("single", SINGLE))
    assert (
        " ".join(lines[0].split()) == "tuned facts after drop, points topics after gain, points text after drop, nats"
    )
    assert lines[2].split()[:5] == ["layer", "0", "0.500", "+40.0", "±3.0"]
    nested = printed(study("top", SINGLE[:2]))
    assert nested[2].split() == ["none", "0.900", "0.100", "2.000"]


def test_a_benchmark_that_a_cell_lacks_is_a_dash() -> None:
    rows = [SINGLE[0], SINGLE[1] | {"benchmarks": SINGLE[1]["benchmarks"][:1]}]
    assert printed(study("single", rows))[3].split()[-4:] == ["–"] * 4


def test_nothing_to_draw_is_no_chart() -> None:
    assert study_charts(study("single", [SINGLE[0] | {"benchmarks": []}])) == []
    assert study_charts(study("single", SINGLE[2:])) == []
