"""The figure of curvature shows each update's shares by tenths, with what a blind one would show."""

from __future__ import annotations

import io
from typing import Any

import numpy
import pytest
from matplotlib.axes import Axes
from rich.console import Console

from keeptune.report.figures.weight_profiles import curvature_figure
from keeptune.report.tables.analyses import print_curvature


def side(first: float, felt: float) -> dict[str, Any]:
    shares = [first] + [(1 - first) / 9] * 9
    return {"curvature": shares, "directions": shares[::-1], "isotropic": [0.01] * 9 + [0.91], "felt": felt}


def record(*sides: dict[str, Any]) -> dict[str, Any]:
    return {"sources": [{"label": f"run {n}", "sides": own} for n, own in enumerate(sides)]}


def lines(axes: Axes) -> dict[str, list[float]]:
    return {str(line.get_label()): numpy.asarray(line.get_ydata()).tolist() for line in axes.lines}


def test_a_row_for_each_kind_of_tenth_and_a_column_for_each_side() -> None:
    figure = curvature_figure(record({"input": side(0.1, 1), "output": side(0.2, 2)}, {"input": side(0.3, 3)}))
    assert figure is not None
    mass, other_mass, count, _ = figure.axes
    assert lines(mass)["run 0"] == pytest.approx([10] * 10)
    assert lines(mass)["run 1"][0] == pytest.approx(30)
    assert lines(mass)["blind to curvature"] == pytest.approx([1] * 9 + [91])
    assert "run 1" not in lines(other_mass), "it has no output side"
    assert lines(count)["run 1"][-1] == pytest.approx(30)
    assert lines(count)["blind to curvature"] == pytest.approx([10] * 10)
    assert (mass.get_title(loc="left"), other_mass.get_title(loc="left")) == ("input side", "output side")


def test_one_side_is_one_column() -> None:
    figure = curvature_figure(record({"input": side(0.1, 1)}))
    assert figure is not None
    assert len(figure.axes) == 2
    assert curvature_figure(record({})) is None


def test_the_table_tells_what_is_felt() -> None:
    console = Console(file=io.StringIO(), width=120)
    print_curvature(record({"input": side(0.2, 1.234), "output": side(0.1, 2)}), console)
    assert isinstance(console.file, io.StringIO)
    rows = [line.split() for line in console.file.getvalue().splitlines()]
    stiff = 20 + 4 * 80 / 9
    assert ["run", "0", "input", "1.23", f"{stiff:.1f}%", f"{80 / 9:.1f}%"] in rows
