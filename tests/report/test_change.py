"""The figure of weight changes has a map for each model in one scale, and their profiles."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import pytest
from rich.console import Console

from keeptune.core.artefact import canonical_json
from keeptune.report.estimates import totals
from keeptune.report.pages.study_charts import change_charts
from keeptune.report.tables.analyses import print_change


def row(layer: int, role: str, norm: float, weight: float = 10.0) -> dict[str, Any]:
    return {
        "target": f"{layer}.{role}",
        "layer": layer,
        "role": role,
        "norm": norm,
        "weight": weight,
        "relative": norm / weight if weight else None,
    }


def source(label: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {"label": label, "rows": rows, "layers": totals(rows, "layer"), "roles": totals(rows, "role")}


ROWS = [row(0, "q", 3.0), row(0, "v", 4.0), row(1, "q", 1.0), row(1, "v", 0.0, 0.0), row(-1, "proj", 9.0)]


def test_totals_are_roots_of_sums_of_squares() -> None:
    layers = totals(ROWS, "layer")
    assert list(layers) == ["0", "1"]
    assert layers["0"]["norm"] == pytest.approx(5)
    assert layers["0"]["relative"] == pytest.approx(5 / math.sqrt(200))
    assert totals(ROWS, "role")["q"]["norm"] == pytest.approx(math.sqrt(10))
    assert totals(ROWS, "role")["v"]["relative"] == pytest.approx(0.4)
    assert totals([row(0, "q", 0.0, 0.0)], "role")["q"]["relative"] is None
    assert list(totals([row(n, "q", 1) for n in (10, 9, 2)], "layer")) == ["2", "9", "10"]


def test_maps_share_their_scale_and_profiles_their_plot() -> None:
    charts = change_charts({"sources": [source("a", ROWS), source("b", [row(0, "q", 2.0), row(1, "q", 8.0)])]})
    first, second, relative, norm = (chart.figure.data for chart in charts)
    assert list(first[0].text) == [["30.0", "10.0"], ["40.0", ""]], "no share of a weight of zeros"
    assert list(second[0].text) == [["20.0", "80.0"]]
    assert [(own[0].zmin, own[0].zmax) for own in (first, second)] == [pytest.approx((0, 80))] * 2
    assert charts[0].alt.startswith("a:")
    assert {line.name: line.y for line in relative} == {
        "a": pytest.approx((100 * 5 / math.sqrt(200), 10)),
        "b": pytest.approx((20, 80)),
    }
    assert norm[0].y == pytest.approx((5, 1))


def test_many_layers_have_a_colour_bar_instead_of_numbers() -> None:
    record = {"sources": [source("a", [row(n, "q", n / 10) for n in range(40)])]}
    for own in (record, json.loads(canonical_json(record))):  # JSON sorts layers as words
        chart, profile, _ = change_charts(own)
        assert chart.figure.data[0].texttemplate is None
        assert profile.figure.data[0].x == tuple(range(40))


def test_nothing_in_a_block_is_no_figure() -> None:
    assert change_charts({"sources": [source("a", [row(-1, "proj", 1.0)])]}) == []
    assert len(change_charts({"sources": [source("a", [row(0, "q", 0.0)])]})) == 3


def test_the_table_has_layers_and_roles() -> None:
    console = Console(file=io.StringIO(), width=80)
    experts = [row(0, "up", 3.0), row(0, "up", 4.0)]
    print_change({"sources": [source("a", ROWS), source("b", experts)]}, console)
    assert isinstance(console.file, io.StringIO)
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    assert ["0", "30.00", "40.00", "35.36"] in lines
    assert ["1", "10.00", "–", "10.00"] in lines
    assert ["0", "35.36", "35.36"] in lines, "experts of one layer are put together"
