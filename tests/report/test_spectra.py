"""Maps of importance, and which part of a spectrum a plan keeps."""

from __future__ import annotations

from typing import Any

import numpy
import pytest

from keeptune.report import plots
from keeptune.report.html import render_html
from keeptune.report.records import as_report
from keeptune.report.spectra import kept_places

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


@pytest.mark.parametrize(
    ("kept", "places"),
    [
        ([8.0, 4.0], [0, 1]),
        ([0.5, 2.0], [4, 2]),
        ([1.0], [3]),
        ([2.0004], [2]),
        ([2.1], None),
        ([2.0, 2.0], None),
        ([8.0] * 6, None),
        ([], None),
        ([float("nan")], None),
    ],
)
def test_kept_places(kept: list[float], places: list[int] | None) -> None:
    assert kept_places(SPECTRUM, kept) == places


def test_equal_values_take_places_of_their_own() -> None:
    assert sorted(kept_places([3.0, 1.0, 1.0, 1.0], [1.0, 1.0]) or []) == [1, 2]
    assert kept_places([float("nan")] * 2, [1.0]) is None
    assert kept_places([], [1.0]) is None


def test_few_layers_show_values_with_dots_at_what_is_kept(minimal: dict[str, Any]) -> None:
    figure = plots.kept_spectra(report(minimal, 2, [2.0, 0.5]), "lora")
    assert figure is not None
    panel = figure.axes[0]
    assert numpy.asarray(panel.lines[0].get_ydata()).tolist() == SPECTRUM
    assert numpy.asarray(panel.collections[0].get_offsets()).tolist() == [[2, 2.0], [4, 0.5]]


def test_many_layers_show_strips(minimal: dict[str, Any]) -> None:
    figure = plots.kept_spectra(report(minimal, 9, [8.0, 4.0, 1.0]), "lora")
    assert figure is not None
    whole, thick = figure.axes[0].collections[2:4]
    assert [part.tolist() for part in whole.get_segments()] == [[[0, 1], [4, 1]]]  # type: ignore[attr-defined]
    runs = [part.tolist() for part in thick.get_segments()]  # type: ignore[attr-defined]
    assert runs == [[[-0.5, 1], [1.5, 1]], [[2.5, 1], [3.5, 1]]]


def test_what_is_no_part_of_the_spectrum_is_drawn_apart(minimal: dict[str, Any]) -> None:
    made = report(minimal, 2, [3.0, 0.7])
    assert plots.kept_spectra(made, "lora") is None
    assert plots.evidence_names(made, "lora") == ["spectrum", "singular_values"]
    assert "Singular values: lora" in render_html(made)


def test_the_page_shows_importance_and_kept_part_and_notes(minimal: dict[str, Any]) -> None:
    page = render_html(report(minimal, 2, [2.0, 0.5]))
    assert "Importances behind lora by layer and role" in page
    assert "Spectra, and what is kept of them: lora" in page
    assert "Singular values: lora" not in page
    assert "<dd>&lt;i&gt;as&lt;/i&gt; it is</dd>" in page


def test_importance_is_drawn_by_its_logarithm(minimal: dict[str, Any]) -> None:
    made = report(minimal, 3, [2.0])
    assert as_report(made).runs[0].plan[-1].importance == 1e-3
    figure = plots.importance_map(made, "lora")
    assert figure is not None
    mesh = figure.axes[0].collections[0]
    values = mesh.get_array()
    assert values is not None
    assert values.tolist() == [[0.1, 0.01, 0.001]] * 2
    assert mesh.norm(0.01) == pytest.approx(0.5)
    written = [text.get_text() for text in figure.axes[0].texts]
    assert written == ["1e-1", "1e-2", "1e-3"] * 2


@pytest.mark.parametrize("weights", [[0.0, 0.0], [float("nan"), -1.0]])
def test_no_positive_importance_no_map(minimal: dict[str, Any], weights: list[float]) -> None:
    made = report(minimal, 1, [2.0])
    for row, weight in zip(made["methods"][0]["plan"], weights, strict=True):
        row["evidence"] = {"importance": [weight]}
    assert plots.importance_map(made, "lora") is None


def test_maps_of_many_layers_and_experts_stay_small(minimal: dict[str, Any]) -> None:
    rows = [
        {"layer": layer, "role": f"experts.{n}", "rank": 1 + n % 3, "evidence": {"importance": [1e-3 * (n + 1)]}}
        for layer in range(12)
        for n in range(128)
    ]
    minimal["methods"][0]["plan"] = rows
    for figure in (plots.rank_map(minimal, "lora"), plots.importance_map(minimal, "lora")):
        assert figure is not None
        assert figure.get_figheight() < 13
        assert len(figure.axes) == 2, "a key instead of numbers"
