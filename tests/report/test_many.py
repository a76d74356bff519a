"""A report of sixteen methods can be read: looks differ, sentences stay short, tables narrow."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy
import pytest

from keeptune.report.grids import Cell, Grid
from keeptune.report.pages import run_charts, run_tables
from keeptune.report.pages.charts import mark
from keeptune.report.pages.run_page import render_html
from keeptune.report.pages.verdict import verdict
from keeptune.report.records import as_report

NAMES = [f"method-{letter}" for letter in "abcdefghijklmnop"]


@pytest.fixture
def many(make: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    draw = numpy.random.default_rng(3)
    report = make(*((name, 0.4 + 0.5 * draw.random(), 0.7 + 0.2 * draw.random()) for name in NAMES))
    for index, run in enumerate(report["methods"]):
        run["loss"] = [{"step": step, "loss": 1 + 0.01 * index + 1 / (1 + step)} for step in range(20)]
        run["options"] = {"rank": 8, "train.learning_rate": 1e-3 if index else 1e-4}
    report["methods"][3]["options"]["beta"] = 2
    return report


def test_every_method_has_a_look_of_its_own() -> None:
    looks = [mark(index) for index in range(136)]
    assert len({one.colour for one in looks[: len(NAMES)]}) == len(NAMES)
    assert len({(one.colour, one.symbol) for one in looks}) == 136
    assert looks[3] == mark(3)


def test_so_many_losses_have_no_raw_values_behind(many: dict[str, Any]) -> None:
    chart = run_charts.losses(as_report(many))
    assert chart is not None
    assert [trace.name for trace in chart.figure.data] == NAMES


def test_the_verdict_counts_what_it_cannot_name(make: Callable[..., dict[str, Any]], many: dict[str, Any]) -> None:
    report = make(("best", 0.99, 0.9), *((name, 0.3 + 0.01 * n, 0.5) for n, name in enumerate(NAMES)))
    said = verdict(report)
    assert "best lost the least of facts (1.0 points), clearly less than all 16 others (55 to 70)" in said
    report = make(("best", 0.99, 0.9), ("tied", 0.98, 0.9), *((name, 0.3, 0.5) for name in NAMES))
    assert "no clear difference to tied (2.0), and clearly less than 16 others" in verdict(report)
    report = make(("a", 0.8, 0.9), *((name, 0.8, 0.5) for name in NAMES))
    assert "a (0.900) is clearly ahead of 16 others" in verdict(report)
    text = render_html(many)
    assert "<li>" not in text
    assert "raw values" not in text


def test_options_tell_the_common_from_the_rare(many: dict[str, Any]) -> None:
    common, grid = run_tables.options(as_report(many))
    assert common == "rank 8"
    assert grid is not None
    assert grid.rows[0] == ("method-a", Cell("train.learning rate 0.0001", kind="path"))
    assert grid.rows[3] == ("method-d", Cell("train.learning rate 0.001; beta 2", kind="path"))
    text = render_html(many)
    assert "The same for all: rank 8." in text
    assert re.search(r'<td class="path">train.learning rate 0.001; beta 2</td>', text)


def test_lists_among_options_are_told_in_words(many: dict[str, Any]) -> None:
    for run in many["methods"]:
        run["options"]["lora.targets"] = ["q_proj", "up_proj"]
    common, _ = run_tables.options(as_report(many))
    assert "q_proj up_proj" in common
    assert "[" not in common


def test_options_of_one_method_and_of_none(minimal: dict[str, Any]) -> None:
    assert run_tables.options(as_report(minimal)) == ("", None)
    minimal["methods"][0]["options"] = {"rank": 8, "alpha": None}
    common, grid = run_tables.options(as_report(minimal))
    assert common == ""
    assert grid == Grid(("method", "options"), (("lora", Cell("rank 8; alpha –", kind="path")),))


def test_options_that_are_all_the_same_need_no_table(many: dict[str, Any]) -> None:
    for run in many["methods"]:
        run["options"] = {"rank": 8}
    assert run_tables.options(as_report(many)) == ("rank 8", None)
    assert "The same for all: rank 8." in render_html(many)
