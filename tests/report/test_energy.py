"""The energy figure has a line for each role and their mean, and its table keeps layers and roles in place."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from keeptune.report.estimates import layer_means
from keeptune.report.pages.study_charts import energy_charts
from keeptune.report.tables.terminal import print_grid


def row(layer: int, role: str, energy: float | None) -> dict[str, Any]:
    return {"layer": layer, "role": role, "energy": energy}


ROWS = [row(1, "q", 0.2), row(0, "q", 0.4), row(0, "v", 0.2), row(1, "v", None), row(-1, "head", 0.9)]


def test_means_leave_out_what_is_in_no_block_and_what_is_zero() -> None:
    assert layer_means(ROWS) == pytest.approx({0: 0.3, 1: 0.2})


def test_a_line_for_each_role_and_the_mean() -> None:
    (chart,) = energy_charts(ROWS, 5, "tiny")
    lines = {trace.name: trace for trace in chart.figure.data}
    assert set(lines) == {"q", "v", "mean"}
    assert (lines["q"].x, lines["q"].y) == ((0, 1), (0.4, 0.2))
    assert lines["mean"].y == pytest.approx((0.3, 0.2))
    assert chart.alt.startswith("tiny: energy in the top 5")
    assert chart.figure.layout.xaxis.range == (-0.5, 1.5), "no tick where there is no layer"


def test_no_block_no_figure() -> None:
    assert energy_charts([row(-1, "head", 0.9)], 5, "tiny") == []


def printed(cells: dict[tuple[int | None, str], list[str]], width: int) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_grid(cells, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_grid_keeps_its_places() -> None:
    lines = printed({(1, "q"): ["8"], (0, "q"): ["4"], (1, "v"): ["16", "2"], (None, "head"): ["1"]}, 80).splitlines()
    assert [line.split() for line in (lines[0], *lines[2:])] == [
        ["layer", "q", "v", "head"],
        ["–", "1"],
        ["0", "4"],
        ["1", "8", "16", "/", "2"],
    ]


def test_a_wide_grid_goes_on_below() -> None:
    text = printed({(layer, f"role{n}"): [str(n)] for layer in range(2) for n in range(30)}, 60)
    assert all(len(line) <= 60 for line in text.splitlines())
    assert all(f"role{n}" in text for n in range(30))
    assert text.count("layer") > 1
