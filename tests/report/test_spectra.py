"""Maps of importance, and spectra behind a plan."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from keeptune.core.errors import ArtefactError
from keeptune.core.evidence import bounded
from keeptune.report.pages.charts import Chart
from keeptune.report.pages.layer_charts import ranks, spectra
from keeptune.report.pages.run_page import render_html
from keeptune.report.records import as_report

SPECTRUM = [8.0, 4.0, 2.0, 1.0, 0.5]


def report(minimal: dict[str, Any], layers: int, kept: list[float]) -> dict[str, Any]:
    evidence = {"spectrum": SPECTRUM, "singular_values": kept}
    rows = [
        {"target": f"layers.{layer}.{role}", "layer": layer, "role": role, "rank": len(kept)}
        | {"evidence": evidence | {"importance": [10.0 ** -(layer + 1)]}}
        for layer in range(layers)
        for role in ("q", "v")
    ]
    minimal["methods"][0] |= {"plan": rows, "notes": ["<i>as</i> it is", "second"]}
    return minimal


def chart_of(report: dict[str, Any]) -> Chart:
    (chart,) = [chart for chart in spectra(as_report(report)) if chart.alt.startswith("Spectrum: lora")]
    return chart


def test_the_whole_spectrum_is_drawn_by_its_values(minimal: dict[str, Any]) -> None:
    chart = chart_of(report(minimal, 2, [2.0, 0.5]))
    assert chart.figure.data[0].y == tuple(SPECTRUM)
    assert chart.figure.layout.yaxis.type == "log"
    many = chart_of(report(minimal, 32, [2.0]))
    assert len(many.figure.data) == 2 * 6
    assert many.alt == "Spectrum: lora (6 of 32 layers)"


def test_the_page_shows_importance_and_spectra_and_notes(minimal: dict[str, Any]) -> None:
    page = render_html(report(minimal, 2, [2.0, 0.5]))
    assert "Importances behind lora by layer and role" in page
    assert "Singular values: lora" in page and "Spectrum: lora" in page
    assert "<dd>&lt;i&gt;as&lt;/i&gt; it is</dd>" in page


def test_importance_is_coloured_by_its_logarithm(minimal: dict[str, Any]) -> None:
    made = as_report(report(minimal, 3, [2.0]))
    assert made.runs[0].plan[-1].importance == 1e-3
    (chart,) = [chart for chart in ranks(made) if chart.name == "importances0"]
    (trace,) = chart.figure.data
    assert [list(row) for row in trace.z] == [pytest.approx([-1, -2, -3])] * 2
    assert [list(row) for row in trace.text] == [["1.0e-01", "1.0e-02", "1.0e-03"]] * 2
    assert trace.colorbar.ticktext == ("1.0e-03", "4.6e-03", "2.2e-02", "1.0e-01")


@pytest.mark.parametrize("weights", [[0.0, 0.0], [float("nan"), -1.0]])
def test_no_positive_importance_no_map(minimal: dict[str, Any], weights: list[float]) -> None:
    made = report(minimal, 1, [2.0])
    for row, weight in zip(made["methods"][0]["plan"], weights, strict=True):
        row["evidence"] = {"importance": [weight]}
    assert ranks(as_report(made)) == []


def test_maps_of_many_layers_and_experts_stay_small(minimal: dict[str, Any]) -> None:
    rows = [
        {"layer": layer, "role": f"experts.{n}", "rank": 1 + n % 3, "evidence": {"importance": [1e-3 * (n + 1)]}}
        for layer in range(20)
        for n in range(128)
    ]
    minimal["methods"][0]["plan"] = rows
    charts = ranks(as_report(minimal))
    assert [chart.name for chart in charts] == ["ranks0", "importances0"]
    for chart in charts:
        assert chart.height < 800
        assert chart.figure.data[0].texttemplate is None, "a key instead of numbers"
        assert len(chart.figure.layout.yaxis.ticktext) <= 40


def test_a_wide_spectrum_is_drawn_at_the_points_that_the_report_has(minimal: dict[str, Any]) -> None:
    """Of 1000 numbers; what a method takes is among them."""
    whole = torch.linspace(9, 1, 1000).square()
    chosen = [0, 1, 517, 518, 900]
    kept = bounded({"spectrum": whole, "singular_values": whole[chosen]})
    made = report(minimal, 2, [1.0])
    for row in made["methods"][0]["plan"]:
        row["evidence"] = kept
    drawn = chart_of(made).figure.data[0]
    assert {0, 47, 517, 518, 900, 984, 999} <= set(drawn.x)
    assert len(drawn.x) <= 133
    for x, y in zip(drawn.x, drawn.y, strict=True):
        assert y == pytest.approx(float(whole[x]), rel=1e-8)
    del made["methods"][0]["plan"][0]["evidence"]["spectrum"]["at"][3]
    with pytest.raises(ArtefactError, match="evidence"):
        as_report(made)
