"""Figures and charts are made for full and minimal reports, and the same report gives the same bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import plotly.graph_objects as go
import pytest
from matplotlib.image import imread

from keeptune.report.figures import drawn, write_figure, write_figures
from keeptune.report.pages import layer_charts, run_charts
from keeptune.report.pages.charts import Chart, heat_map, map_chart
from keeptune.report.pages.sweep_charts import sweep_charts
from keeptune.report.records import as_report


def swept(report: dict[str, Any]) -> list[Chart]:
    """Draw a report's runs as the points of a sweep."""
    return sweep_charts({"rows": [{**run, "x": None, "method": run["name"]} for run in report["methods"]]})


def test_minimal_report_draws_what_it_can(minimal: dict[str, Any]) -> None:
    parsed = as_report(minimal)
    assert run_charts.tradeoff(parsed) is run_charts.losses(parsed) is None
    assert run_charts.relations(parsed) == layer_charts.ranks(parsed) == layer_charts.spectra(parsed) == []


def test_settings_are_put_back_and_bytes_repeat(full: dict[str, Any], tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    charts = swept(full)
    write_figures([charts[0], None], tmp_path / "figures")
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"sweep0.svg", "sweep0.png"}
    for kind in ("png", "svg"):
        write_figure(charts[:1], tmp_path / f"again.{kind}")
        assert (tmp_path / f"again.{kind}").read_bytes() == (tmp_path / "figures" / f"sweep0.{kind}").read_bytes()
    assert imread(tmp_path / "again.png").shape[1] > 1000
    assert dict(matplotlib.rcParams) == before


def test_files_hold_the_numbers_of_the_page(full: dict[str, Any]) -> None:
    """Lines, intervals, legends, cells, frames and bars stand in the file as Plotly has them."""
    (chart, *_) = swept(full)
    (axes,) = drawn([chart]).axes
    plain = [line for line in axes.lines if line.get_linestyle() == "None" and line.get_markersize() > 4]
    assert [float(line.get_ydata()[0]) for line in plain][:3] == [y for t in chart.figure.data[1:2] for y in t.y][:3]
    assert len(axes.containers) == sum(trace.error_y.array is not None for trace in chart.figure.data)
    values = [[0.1, math.nan], [0.5, 0.9]]
    figure = heat_map(values, (("", ["x", "y"]), ("layer", ["0", "1"])), "cool", "share", "{:g}".format, (0.0, 1.0))
    figure.add_shape(type="rect", x0=-0.5, x1=0.5, y0=-0.5, y1=0.5, line={"color": "var(--ink)"})
    bars = go.Figure([go.Bar(x=[0, 1], y=[2.0, 1.0], marker={"color": "var(--c0)"})])
    cells, standing = drawn([map_chart("m", "a map", figure), Chart("b", "bars", bars)]).axes
    assert {text.get_position(): text.get_text() for text in cells.texts} == {
        (0, 0): "0.1",
        (0, 1): "0.5",
        (1, 1): "0.9",
    }
    assert (cells.get_ylim(), len(cells.patches)) == ((1.5, -0.5), 1)
    assert [patch.get_height() for patch in standing.patches] == [2.0, 1.0]


def test_dollar_signs_and_markup_are_plain_text(make: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    write_figure(swept(make(("$x_1$ <script>", 0.9, 0.8))), tmp_path / "x.svg")
    root = ElementTree.XML((tmp_path / "x.svg").read_text("utf-8"))
    assert "$x_1$ <script>" in " ".join(part.strip() for part in root.itertext() if part.strip())


def test_spectra_of_methods_that_share_them_are_drawn_once(full: dict[str, Any]) -> None:
    (chart,) = layer_charts.spectra(as_report(full))
    assert chart.alt == "Spectrum: lora-null-v1 and milora"
    assert chart.labels == ("q_proj", "v_proj")


def test_missing_values_leave_gaps(make: Callable[..., dict[str, Any]]) -> None:
    report = make(("a", 0.9, 0.8), ("b", 0.8, 0.7))
    report["methods"][0]["benchmarks"][0].update(after=None, interval=None)
    report["methods"][0]["loss"] = [{"step": 1, "loss": math.nan}, {"step": 2, "loss": 1.0}]
    assert len(drawn(swept(report)).axes) == 3
    chart = run_charts.tradeoff(as_report(report))
    assert chart is not None and [trace.name for trace in chart.figure.data] == ["b", "base model"]
    assert run_charts.losses(as_report(report)) is None


@pytest.mark.parametrize("count", [3, 50])
def test_relations_are_sorted_and_limited(make: Callable[..., dict[str, Any]], count: int) -> None:
    report = make(("a", 0.9, 0.8))
    groups = {f"r{n}": {"n": 5, "before": 1.0, "after": 1.0 - 0.01 * n} for n in range(count)}
    report["methods"][0]["benchmarks"][0]["groups"] = groups
    (chart,) = run_charts.relations(as_report(report))
    names = chart.figure.layout.yaxis.ticktext
    assert names[0] == f"r{count - 1} (n=5)"
    assert len(names) == min(count, 40)
    assert (chart.caption or "").startswith("facts" if count == 3 else "the 40 most forgotten of 50 relations")
