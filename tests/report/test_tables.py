"""Tables hold the right numbers and fit the terminal."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
from rich.console import Console

from keeptune.report.tables.analyses import print_plan, print_scores
from keeptune.report.tables.comparison_table import (
    comparison_columns,
    comparison_rows,
    print_comparison,
)


def printed(report: dict[str, Any], width: int) -> str:
    """Print a comparison into a text."""
    console = Console(width=width, file=io.StringIO(), color_system=None)
    print_comparison(report, console)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_rows_average_the_seeds(full: dict[str, Any]) -> None:
    rows = comparison_rows(full)
    assert [row["method"] for row in rows] == ["lora", "lora-null-v1", "milora"]
    first = rows[0]
    assert first["seeds"] == [0, 1]
    assert first["knowledge"]["facts"]["after"] == pytest.approx(0.731)
    assert first["knowledge"]["facts"]["low"] < -0.29
    assert first["K"]["high"] - first["K"]["mean"] == pytest.approx(12.7062 * 0.001, rel=1e-3)
    assert first["KT"] is None
    assert first["trained_parameters"] == 1234567


def test_average_forgetting_is_what_k_leaves(full: dict[str, Any]) -> None:
    rows = comparison_rows(full)
    for row in rows:
        assert row["average_forgetting"]["mean"] == pytest.approx(1 - row["K"]["mean"])
    column = next(own for own in comparison_columns(full) if own[0].main == "forgetting")
    kept = rows[0]["K"]
    assert column[1].main == f"{100 * (1 - kept['mean']):.1f}%"
    assert column[1].note == f"±{100 * (kept['high'] - kept['mean']):.2f}"


def test_without_knowledge_there_is_no_forgetting(minimal: dict[str, Any]) -> None:
    minimal["methods"][0]["K"] = None
    assert "forgetting" not in [column[0].main for column in comparison_columns(minimal)]


def test_one_seed_has_no_interval_for_scores(minimal: dict[str, Any]) -> None:
    row = comparison_rows(minimal)[0]
    assert row["K"]["mean"] == 0.7
    assert math.isnan(row["K"]["low"])
    assert row["task"] == {}


def test_cells_are_short_and_empty_columns_go(full: dict[str, Any]) -> None:
    columns = comparison_columns(full)
    assert [column[0].main for column in columns] == [
        "method",
        "facts",
        "wiki",
        "tools",
        "K",
        "T",
        "forgetting",
        "trained",
        "export",
    ]
    assert columns[1][2].main == "1.000 → 0.951"
    assert columns[2][1].note.startswith("[+0.1")
    assert columns[7][1].main == "1.23 M"
    assert columns[8][1].main == "1.0e-06"


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_print_fits_the_terminal(full: dict[str, Any], width: int) -> None:
    text = printed(full, width)
    assert max(map(len, text.splitlines())) <= width
    for word in ("facts", "wiki", "tools", "1.23 M", "1.0e-06", "lora-null-v1"):
        assert word in text


def test_markup_in_a_name_is_printed_as_it_is(minimal: dict[str, Any]) -> None:
    minimal["methods"][0]["name"] = "[red]x[/red]"
    assert "[red]x[/red]" in printed(minimal, 80)


def test_a_method_that_lacks_a_benchmark_shows_a_dash(full: dict[str, Any]) -> None:
    for run in full["methods"][:2]:
        del run["benchmarks"][1]
    assert comparison_columns(full)[2][1].main == "–"


def test_plan_table() -> None:
    console = Console(width=80, file=io.StringIO())
    rows = [{"layer": layer, "role": "q", "rank": 8, "trained_parameters": 1500, "evidence": {}} for layer in range(2)]
    print_plan(rows, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "start error" not in text
    assert "2 targets, 3,000 trained parameters (3.00 k)" in text
    print_plan([], console)
    assert "The plan is empty." in console.file.getvalue()  # type: ignore[attr-defined]


def test_a_plan_of_different_ranks_is_a_grid_with_what_it_rests_on() -> None:
    console = Console(width=80, file=io.StringIO())
    sizes = {(0, "q"): (3, 0.5), (0, "v"): (1, 7e-6), (1, "q"): (12, None)}
    rows = [
        {"layer": layer, "role": role, "rank": rank, "trained_parameters": 10, "start_error": rank * 1e-7}
        | {"evidence": {} if weight is None else {"importance": [weight], "spectrum": [3.0, 2.0]}}
        for (layer, role), (rank, weight) in sizes.items()
    ]
    print_plan(rows, console, ["16 of 24 ranks allotted", "[b]as it is[/b]"])
    text = console.file.getvalue()  # type: ignore[attr-defined]
    lines = [line.split() for line in text.splitlines() if line.strip()]
    assert lines[0] == ["rank"]
    assert (lines[1], lines[3], lines[4]) == (["layer", "q", "v"], ["0", "3", "1"], ["1", "12"])
    assert lines[5] == ["importance"]
    assert lines[8] == ["0", "5.0e-01", "7.0e-06"]
    assert lines[9:11] == [["16", "of", "24", "ranks", "allotted"], ["[b]as", "it", "is[/b]"]]
    assert lines[11] == ["start", "error:", "at", "most", "1.2e-06"]
    assert lines[12] == ["3", "targets,", "30", "trained", "parameters", "(30)"]


def test_scores_are_printed_with_their_interval() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    item = {"name": "facts", "role": "knowledge", "metric": "exact_match", "n": 360}
    print_scores([item | {"before": 0.994, "after": 0.852, "interval": [-0.18, -0.108]}], console)
    text = console.export_text()
    assert "facts" in text and "0.994" in text and "0.852" in text
    assert "[-0.180, -0.108]" in text
    print_scores([], console)
    assert "no benchmarks" in console.export_text()
