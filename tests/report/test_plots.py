"""Figures are made for full and minimal reports, and the same report gives the same bytes."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Annotation

from keeptune.report import plots
from keeptune.report.placing import spread
from keeptune.report.records import parse_report
from keeptune.report.style import looks


def texts(figure: Figure) -> str:
    """Collect what a figure says.

    Args:
        figure: The figure.

    Returns:
        All text of its SVG.
    """
    root = ElementTree.XML(plots.svg(figure))
    return " ".join(part.strip() for part in root.itertext() if part.strip())


def test_every_figure_of_a_full_report(full: dict[str, Any]) -> None:
    figures = [
        plots.tradeoff(full),
        plots.forgetting_by_benchmark(full),
        plots.forgetting_by_relation(full),
        plots.rank_map(full, "milora"),
        plots.spectra(full, "milora", "spectrum"),
        plots.loss_curves(full),
    ]
    assert all(figure is not None for figure in figures)


def test_minimal_report_draws_what_it_can(minimal: dict[str, Any]) -> None:
    assert plots.tradeoff(minimal) is None
    assert plots.forgetting_by_benchmark(minimal) is not None
    assert plots.forgetting_by_relation(minimal) is None
    assert plots.rank_map(minimal, "lora") is None
    assert plots.loss_curves(minimal) is None
    assert plots.evidence_names(minimal, "lora") == []
    assert plots.spectra(minimal, "lora", "spectrum") is None


def test_settings_are_put_back_and_bytes_repeat(full: dict[str, Any], tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    one, two = plots.tradeoff(full), plots.tradeoff(full)
    assert one is not None and two is not None
    assert plots.svg(one) == plots.svg(two) == plots.svg(one)
    plots.png(one, tmp_path / "one.png")
    plots.png(two, tmp_path / "two.png")
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()
    assert dict(matplotlib.rcParams) == before


def test_tradeoff_names_every_method_without_overlap(make: Callable[..., dict[str, Any]]) -> None:
    report = make(("lora", 0.9, 0.8), ("milora", 0.905, 0.802), ("corda", 0.9, 0.803), ("pissa", 0.7, 0.82))
    figure = plots.tradeoff(report)
    assert figure is not None
    labels = [item for item in figure.axes[0].texts if isinstance(item, Annotation)]
    named = [item for item in labels if item.get_text() in ("lora", "milora", "corda", "pissa")]
    assert len(named) == 4
    for one, two in combinations(named, 2):
        first, second = _text_box(one), _text_box(two)
        assert not first.overlaps(second), (one.get_text(), two.get_text())


def _text_box(item: Annotation) -> Any:
    """Measure the text of an annotation without its line.

    Args:
        item: The annotation.

    Returns:
        The box.
    """
    item.arrow_patch = None
    return item.get_window_extent()


def test_tradeoff_marks_a_distant_base_at_the_edge(make: Callable[..., dict[str, Any]]) -> None:
    figure = plots.tradeoff(make(("a", 0.9, 0.8), ("b", 0.8, 0.81)))
    assert figure is not None
    assert "← base model at 0.050" in texts(figure)


def test_dollar_signs_and_markup_are_plain_text(make: Callable[..., dict[str, Any]]) -> None:
    figure = plots.forgetting_by_benchmark(make(("$x_1$ <script>", 0.9, 0.8)))
    assert figure is not None
    assert "$x_1$ <script>" in texts(figure)


def test_relations_are_sorted_and_limited(full: dict[str, Any]) -> None:
    figure = plots.forgetting_by_relation(full, "facts", limit=2)
    assert figure is not None
    said = texts(figure)
    assert said.index("relation 3  (n=13)") < said.index("relation 2  (n=12)")
    assert "relation 1" not in said
    assert "2 most forgotten of 4 relations" in said
    assert plots.forgetting_by_relation(full, "wiki") is None


def test_uniform_rank(full: dict[str, Any]) -> None:
    assert plots.uniform_rank(full, "lora-null-v1") == 8
    assert plots.uniform_rank(full, "milora") is None
    assert plots.uniform_rank(full, "lora") is None


def test_wide_rank_map_has_a_key_instead_of_numbers(minimal: dict[str, Any]) -> None:
    minimal["methods"][0]["plan"] = [
        {"target": f"layers.{layer}.q", "layer": layer, "rank": 100 + layer} for layer in range(48)
    ]
    figure = plots.rank_map(minimal, "lora")
    assert figure is not None
    assert len(figure.axes) == 2
    assert "131" not in texts(figure)


def test_spectrum_panels(full: dict[str, Any]) -> None:
    assert plots.evidence_names(full, "milora") == ["spectrum"]
    figure = plots.spectra(full, "milora", "spectrum")
    assert figure is not None
    assert [axes.get_title(loc="left") for axes in figure.axes[:2]] == ["q_proj", "v_proj"]
    assert figure.axes[0].get_yscale() == "log"


def test_missing_values_leave_gaps(make: Callable[..., dict[str, Any]]) -> None:
    report = make(("a", 0.9, 0.8), ("b", 0.8, 0.7))
    report["methods"][0]["benchmarks"][0].update(after=None, interval=None)
    assert plots.forgetting_by_benchmark(report) is not None
    assert plots.tradeoff(report) is not None
    report["methods"][0]["loss"] = [{"step": 1, "loss": math.nan}, {"step": 2, "loss": 1.0}]
    assert plots.loss_curves(report) is None


def test_colours_stay_with_the_method(full: dict[str, Any]) -> None:
    found = looks(parse_report(full))
    assert len({(look.colour, look.shape) for look in found.values()}) == 3
    assert found == looks(parse_report(full))


@pytest.mark.parametrize("wanted", [[0.0, 0.1, 0.2], [5.0, 0.0, 0.05], [1.0], []])
def test_spread_keeps_order_and_gap(wanted: list[float]) -> None:
    moved = spread(wanted, 1.0)
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    assert all(moved[b] - moved[a] >= 1.0 - 1e-9 for a, b in pairwise(order))
