"""The figure of curvature shows each update's shares by tenths, with what a blind one would show."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from keeptune.report.pages.charts import Chart
from keeptune.report.pages.study_charts import curvature_charts
from keeptune.report.tables.analyses import print_curvature


def side(first: float, felt: float) -> dict[str, Any]:
    shares = [first] + [(1 - first) / 9] * 9
    return {"curvature": shares, "directions": shares[::-1], "isotropic": [0.01] * 9 + [0.91], "felt": felt}


def record(*sides: dict[str, Any]) -> dict[str, Any]:
    return {"sources": [{"label": f"run {n}", "sides": own} for n, own in enumerate(sides)]}


def lines(chart: Chart) -> dict[str, list[float]]:
    return {line.name: list(line.y) for line in chart.figure.data}


def test_each_side_has_a_chart_for_each_kind_of_tenth() -> None:
    charts = curvature_charts(record({"input": side(0.1, 1), "output": side(0.2, 2)}, {"input": side(0.3, 3)}))
    assert [chart.name for chart in charts] == [
        f"{a}-{b}" for a in ("input", "output") for b in ("curvature", "directions")
    ]
    mass, count, other_mass, _ = map(lines, charts)
    assert mass["run 0"] == pytest.approx([10] * 10)
    assert mass["run 1"][0] == pytest.approx(30)
    assert mass["blind to curvature"] == pytest.approx([1] * 9 + [91])
    assert "run 1" not in other_mass, "it has no output side"
    assert count["run 1"][-1] == pytest.approx(30)
    assert count["blind to curvature"] == pytest.approx([10] * 10)
    assert len(curvature_charts(record({"input": side(0.1, 1)}))) == 2
    assert curvature_charts(record({})) == []


def test_the_table_tells_what_is_felt() -> None:
    console = Console(file=io.StringIO(), width=120)
    print_curvature(record({"input": side(0.2, 1.234), "output": side(0.1, 2)}), console)
    assert isinstance(console.file, io.StringIO)
    rows = [line.split() for line in console.file.getvalue().splitlines()]
    stiff = 20 + 4 * 80 / 9
    assert ["run", "0", "input", "1.23", f"{stiff:.1f}%", f"{80 / 9:.1f}%"] in rows
