"""The benefit of a cell is its score over the baseline's of the same seed, more being better."""

from __future__ import annotations

import io
import json
import math
from typing import Any

import pytest
from rich.console import Console

from keeptune.core.artefact import canonical_json
from keeptune.experiments.effects import benefits
from keeptune.report.pages.sweep_charts import benefit_charts
from keeptune.report.tables.analyses import print_benefits

AXES = [{"key": "method.strength", "values": [0.1, 10]}, {"key": "method.batches", "values": [1, 2, 3]}]


def run(name: str, seed: int, facts: float, topics: float, text: float = 2.0) -> dict[str, Any]:
    scores = [
        ("facts", "knowledge", "exact_match", 0.9, facts),
        ("topics", "task", "exact_match", 0.0, topics),
        ("text", "knowledge", "cross_entropy", 1.5, text),
    ]
    keys = ("name", "role", "metric", "before", "after")
    return {"name": name, "seed": seed, "benchmarks": [dict(zip(keys, score, strict=True)) for score in scores]}


def record(rows: list[dict[str, Any]], baseline: str | None = "plain") -> dict[str, Any]:
    cells = {f"{down}{across}": [down, across] for down in range(2) for across in range(3)}
    made = {"rows": rows, "grid": {"axes": AXES, "cells": cells}, "failed": {}}
    made |= {} if baseline is None else {"baseline": baseline}
    return made | {"benefit": benefits(made)}


def grid(seeds: tuple[int, ...] = (0, 1)) -> list[dict[str, Any]]:
    rows = [run("plain", seed, 0.5 + seed / 10, 0.6, 2.2) for seed in seeds]
    for seed in seeds:
        for down in range(2):
            for across in range(3):
                kept = 0.5 + seed / 10 + 0.1 * down + 0.01 * across + 0.02 * seed
                rows.append(run(f"{down}{across}", seed, kept, 0.6 - 0.1 * down, 2.2 - 0.5 * down))
    return rows


def of(made: dict[str, Any], name: str) -> dict[str, Any]:
    (table,) = (table for table in made["benefit"] if table["name"] == name)
    return dict(table)


def means(table: dict[str, Any]) -> list[list[float]]:
    return [[cell["mean"] for cell in line] for line in table["cells"]]


def test_benefits_are_paired_by_seed() -> None:
    facts = of(record(grid()), "facts")
    # The baselines differ by 10 points between seeds; paired, only the 2 points of the cells are left.
    assert facts["cells"][1][2]["seeds"] == pytest.approx({"0": 12.0, "1": 14.0})
    assert means(facts) == [pytest.approx([1, 2, 3]), pytest.approx([11, 12, 13])]
    low, high = facts["cells"][0][0]["low"], facts["cells"][0][0]["high"]
    assert (low, high) == pytest.approx((1 - 12.706, 1 + 12.706), rel=1e-3)


def test_means_over_rows_and_columns() -> None:
    facts = of(record(grid()), "facts")
    assert facts["rows"] == pytest.approx([2, 12])
    assert facts["columns"] == pytest.approx([6, 7, 8])
    assert facts["mean"] == pytest.approx(7)


def test_less_cross_entropy_is_a_benefit() -> None:
    text = of(record(grid()), "text")
    assert text["unit"] == "nats"
    assert means(text) == [pytest.approx([0, 0, 0], abs=1e-9), pytest.approx([0.5, 0.5, 0.5])]


def test_the_mean_of_both_weighs_roles_equally() -> None:
    both = of(record(grid()), "mean of learned and kept")
    assert both["role"] == "both"
    assert means(both)[1] == pytest.approx([(11 - 10) / 2, (12 - 10) / 2, (13 - 10) / 2])
    assert record(grid())["benefit"][-1]["name"] == "mean of learned and kept"
    rows = grid()
    for row in rows:
        row["benchmarks"].append(row["benchmarks"][0] | {"name": "more facts"})
    assert means(of(record(rows), "mean of learned and kept"))[1] == pytest.approx([0.5, 1, 1.5])


def test_without_a_baseline_the_benefit_is_over_the_base_model() -> None:
    made = record(grid((0,)), baseline=None)
    assert means(of(made, "facts"))[0] == pytest.approx([-40, -39, -38])
    assert of(made, "facts")["cells"][0][0]["low"] is None, "one seed has no interval"


def test_what_failed_is_left_out() -> None:
    rows = [row for row in grid() if not (row["name"] == "01" or (row["name"] == "00" and row["seed"] == 1))]
    facts = of(record(rows), "facts")
    assert facts["cells"][0][1] is None
    assert list(facts["cells"][0][0]["seeds"]) == ["0"]
    assert facts["rows"] == [None, pytest.approx(12)], "a mean over fewer cells would not compare"
    assert facts["columns"][1] is None
    assert facts["mean"] is None
    lost = [row for row in grid() if not (row["name"] == "plain" and row["seed"] == 0)]
    assert list(of(record(lost), "facts")["cells"][1][1]["seeds"]) == ["1"], "no baseline, no benefit"


def test_grids_of_other_sizes_have_no_table() -> None:
    assert benefits({"rows": grid()}) == []
    assert benefits({"rows": grid(), "grid": {"axes": [{"key": "a", "values": [1]}], "cells": {}}}) == []


def test_the_charts_show_numbers_with_their_means() -> None:
    made = record(grid())
    for own in (made, json.loads(canonical_json(made))):
        charts = benefit_charts(own)
        names = ["facts (keep)", "topics (learn)", "text (keep)", "mean of learned and kept"]
        assert [chart.alt.partition(":")[0] for chart in charts] == names
        texts, layout = charts[0].figure.data[0].text, charts[0].figure.layout
        assert (texts[1][2], texts[1][3], texts[2][0], texts[2][3]) == ("+13.0", "+12.0", "+6.0", "+7.0")
        assert layout.xaxis.ticktext == ("1", "2", "3", "mean")
        assert layout.yaxis.ticktext == ("0.1", "10", "mean")
        assert (layout.xaxis.title.text, layout.yaxis.title.text) == ("method.batches", "method.strength")
        assert charts[0].figure.data[0].colorscale[-1][1] == "var(--gain)"


def test_nothing_to_draw_is_no_chart() -> None:
    assert benefit_charts(record([run("plain", 0, math.inf, 0.1)])) == []


def test_the_table_has_the_first_axis_downwards() -> None:
    console = Console(file=io.StringIO(), width=120)
    print_benefits(record(grid((0,))), console)
    assert isinstance(console.file, io.StringIO)
    lines = [line.split() for line in console.file.getvalue().splitlines()]
    start = next(index for index, line in enumerate(lines) if line[:2] == ["facts", "(keep):"])
    assert lines[start][2:] == ["points", "over", "plain"]
    assert lines[start + 1] == ["strength", "\\", "batches", "1", "2", "3", "mean"]
    assert lines[start + 3] == ["0.1", "0.0", "+1.0", "+2.0", "+1.0"]
    assert lines[start + 5] == ["mean", "+5.0", "+6.0", "+7.0", "+6.0"]
