"""The figure of weight changes has a map for each model in one scale, and their profiles."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import numpy
import pytest
from matplotlib.axes import Axes
from rich.console import Console

from keeptune.core.artefact import canonical_json
from keeptune.report.estimates import totals
from keeptune.report.figures.weight_profiles import change_figure
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


def texts(axes: Axes) -> dict[tuple[float, float], str]:
    return {text.get_position(): text.get_text() for text in axes.texts}


def test_maps_share_their_scale_and_profiles_their_plot() -> None:
    figure = change_figure({"sources": [source("a", ROWS), source("b", [row(0, "q", 2.0), row(1, "q", 8.0)])]})
    assert figure is not None
    first, second, relative, norm = figure.axes
    assert texts(first)[0, 0] == "30.0"
    assert texts(first)[0, 1] == "40.0"
    assert (1, 1) not in texts(first), "no share of a weight of zeros"
    assert texts(second) == {(0, 0): "20.0", (1, 0): "80.0"}
    assert first.collections[0].get_clim() == second.collections[0].get_clim() == (0, pytest.approx(80))
    assert first.get_title(loc="left").startswith("a:")
    lines = {str(line.get_label()): numpy.asarray(line.get_ydata()).tolist() for line in relative.lines}
    assert lines == {"a": pytest.approx([100 * 5 / math.sqrt(200), 10]), "b": pytest.approx([20, 80])}
    assert numpy.asarray(norm.lines[0].get_ydata()).tolist() == pytest.approx([5, 1])


def test_many_layers_have_a_colour_bar_instead_of_numbers() -> None:
    figure = change_figure({"sources": [source("a", [row(n, "q", n / 10) for n in range(40)])]})
    assert figure is not None
    assert not figure.axes[0].texts
    assert len(figure.axes) == 4
    read_back = json.loads(canonical_json(source("a", [row(n, "q", n / 10) for n in range(40)])))
    again = change_figure({"sources": [read_back]})
    assert again is not None
    profiles = [numpy.asarray(f.axes[1].lines[0].get_xdata()).tolist() for f in (figure, again)]
    assert profiles == [list(range(40))] * 2, "JSON sorts layers as words"


def test_nothing_in_a_block_is_no_figure() -> None:
    assert change_figure({"sources": [source("a", [row(-1, "proj", 1.0)])]}) is None
    assert change_figure({"sources": [source("a", [row(0, "q", 0.0)])]}) is not None


def test_the_table_has_layers_and_roles() -> None:
    console = Console(file=io.StringIO(), width=80)
    experts = [row(0, "up", 3.0), row(0, "up", 4.0)]
    print_change({"sources": [source("a", ROWS), source("b", experts)]}, console)
    assert isinstance(console.file, io.StringIO)
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    assert ["0", "30.00", "40.00", "35.36"] in lines
    assert ["1", "10.00", "–", "10.00"] in lines
    assert ["0", "35.36", "35.36"] in lines, "experts of one layer are put together"
