"""Figures and charts are made for full and minimal reports, and the same report gives the same bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest
from matplotlib.figure import Figure

from keeptune.report.estimates import methods
from keeptune.report.figures.drawing import png, save, svg
from keeptune.report.figures.sweep_lines import sweep_figure
from keeptune.report.pages import layer_charts, run_charts
from keeptune.report.records import parse_report


def swept(report: dict[str, Any]) -> Figure | None:
    """Draw a report's runs as the points of a sweep."""
    return sweep_figure({"rows": [{**run, "x": None, "method": run["name"]} for run in report["methods"]]})


def test_minimal_report_draws_what_it_can(minimal: dict[str, Any]) -> None:
    parsed = parse_report(minimal)
    assert run_charts.tradeoff(parsed) is run_charts.losses(parsed) is None
    assert run_charts.relations(parsed) == layer_charts.ranks(parsed) == layer_charts.spectra(parsed) == []


def test_settings_are_put_back_and_bytes_repeat(full: dict[str, Any], tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    one, two = swept(full), swept(full)
    assert one is not None and two is not None
    assert svg(one) == svg(two) == svg(one)
    png(one, tmp_path / "one.png")
    assert save({"two": two}, tmp_path / "figures") == [tmp_path / "figures" / f"two.{end}" for end in ("svg", "png")]
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "figures" / "two.png").read_bytes()
    assert dict(matplotlib.rcParams) == before


def test_dollar_signs_and_markup_are_plain_text(make: Callable[..., dict[str, Any]]) -> None:
    figure = swept(make(("$x_1$ <script>", 0.9, 0.8)))
    assert figure is not None
    root = ElementTree.XML(svg(figure))
    assert "$x_1$ <script>" in " ".join(part.strip() for part in root.itertext() if part.strip())


def test_uniform_rank(full: dict[str, Any]) -> None:
    ranks = {method.label: layer_charts.uniform_rank(method) for method in methods(parse_report(full))}
    assert ranks == {"lora": None, "milora": None, "lora-null-v1": 8}


def test_spectra_of_methods_that_share_them_are_drawn_once(full: dict[str, Any]) -> None:
    (chart,) = layer_charts.spectra(parse_report(full))
    assert chart.alt == "Spectrum: lora-null-v1 and milora"
    assert chart.labels == ("q_proj", "v_proj")


def test_missing_values_leave_gaps(make: Callable[..., dict[str, Any]]) -> None:
    report = make(("a", 0.9, 0.8), ("b", 0.8, 0.7))
    report["methods"][0]["benchmarks"][0].update(after=None, interval=None)
    report["methods"][0]["loss"] = [{"step": 1, "loss": math.nan}, {"step": 2, "loss": 1.0}]
    assert swept(report) is not None
    chart = run_charts.tradeoff(parse_report(report))
    assert chart is not None and [trace.name for trace in chart.figure.data] == ["b", "base model"]
    assert run_charts.losses(parse_report(report)) is None


@pytest.mark.parametrize("count", [3, 50])
def test_relations_are_sorted_and_limited(make: Callable[..., dict[str, Any]], count: int) -> None:
    report = make(("a", 0.9, 0.8))
    groups = {f"r{n}": {"n": 5, "before": 1.0, "after": 1.0 - 0.01 * n} for n in range(count)}
    report["methods"][0]["benchmarks"][0]["groups"] = groups
    (chart,) = run_charts.relations(parse_report(report))
    names = chart.figure.layout.yaxis.ticktext
    assert names[0] == f"r{count - 1} (n=5)"
    assert len(names) == min(count, 40)
    assert (chart.caption or "").startswith("facts" if count == 3 else "the 40 most forgotten of 50 relations")
