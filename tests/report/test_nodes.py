"""Figures and tables of nodes show what the records say."""

from __future__ import annotations

import io
from typing import Any

import numpy
import pytest
import torch
from rich.console import Console

from keeptune.core.evidence import bounded
from keeptune.report.pages.layer_charts import votes
from keeptune.report.pages.run_page import render_html
from keeptune.report.pages.study_charts import density_charts, overlap_charts
from keeptune.report.records import as_report
from keeptune.report.tables.analyses import print_overlap, print_suppressed

VOTES = [[0.0, 0.5, 1.0, 0.0], [0.25, 0.25, 0.0, 0.5]]


def voted(report: dict[str, Any]) -> dict[str, Any]:
    """Give the first run of a report a plan with votes."""
    report["methods"][0]["plan"] = [
        {"target": f"{layer}.down_proj", "layer": layer, "role": "down_proj", "rank": 1, "evidence": {"votes": votes}}
        for layer, votes in enumerate(VOTES)
    ]
    return report


def test_many_votes_are_drawn_as_they_were(minimal: dict[str, Any]) -> None:
    """Of 4,097 nodes: means over 128 ranges, of which the 64 that are drawn are made, to the last digits."""
    counts = torch.randint(0, 50, (2, 4097), generator=torch.Generator().manual_seed(0)).float()
    drawn = []
    for evidence in ([{"votes": row.tolist()} for row in counts], [bounded({"votes": row}) for row in counts]):
        made = voted(minimal)
        for row, own in zip(made["methods"][0]["plan"], evidence, strict=True):
            row["evidence"] = own
        (chart,) = votes(as_report(made))
        drawn.append(numpy.asarray(chart.figure.data[0].z, dtype=float))
    assert drawn[0].shape == (2, 64)
    numpy.testing.assert_allclose(drawn[1], drawn[0], rtol=1e-12)


def test_a_plan_with_votes_gets_a_row_for_each_block(minimal: dict[str, Any]) -> None:
    report = voted(minimal)
    (chart,) = votes(as_report(report))
    assert [list(row) for row in chart.figure.data[0].z] == VOTES
    text = render_html(report)
    assert "How many texts name each node" in text
    assert "Votes:" not in text, "no second picture of the same, as a spectrum"


def test_many_nodes_are_averaged_in_bins(minimal: dict[str, Any]) -> None:
    report = voted(minimal)
    for row, share in zip(report["methods"][0]["plan"], (0.2, 0.4), strict=True):
        row["evidence"]["votes"] = [share, 0.0] * 100
    (chart,) = votes(as_report(report))
    table = numpy.array(chart.figure.data[0].z)
    assert table.shape == (2, 64)
    assert table.mean(axis=1) == pytest.approx([0.1, 0.2], rel=0.02)


def test_without_votes_there_is_no_picture(minimal: dict[str, Any]) -> None:
    assert votes(as_report(minimal)) == []
    report = voted(minimal)
    for row in report["methods"][0]["plan"]:
        row["evidence"]["votes"] = [0.0] * 4
    assert votes(as_report(report)) == []


def benchmark(after: float) -> dict[str, Any]:
    scores = {"before": 0.9, "after": after, "interval": [after - 1.0, after - 0.8]}
    return {"name": "facts", "role": "knowledge", "metric": "exact_match", "n": 10, "groups": {}} | scores


def entry(name: str, seed: int, after: float) -> dict[str, Any]:
    empty = {"T": None, "KT": None, "adapter": "", "export_gap": None}
    rows = [[0, 1], [2]]
    return {"name": name, "seed": seed, "K": after / 0.9, "benchmarks": [benchmark(after)], "rows": rows} | empty


SUPPRESSED: dict[str, Any] = {
    "base": "tiny",
    "q": 5.0,
    "over": "global",
    "texts": 7,
    "nodes": 4,
    "layers": [1, 3],
    "profile": [1.0, 0.5],
    "density": {"q": 5.0, "edges": [0, 1, 2, 3, 4], "highest": VOTES, "lowest": VOTES[::-1]},
    "methods": [entry("S-H", 0, 0.45), entry("S-L", 0, 0.81), entry("random", 0, 0.9), entry("random", 1, 0.72)],
    "gaps": [{"name": "facts", "metric": "exact_match", "S-L less S-H": 0.36, "interval": [0.1, 0.5]}],
}


def said(write: Any, record: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=100)
    write(record, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_what_suppression_costs_is_told_beside_the_base() -> None:
    text = said(print_suppressed, SUPPRESSED)
    assert "3 of 8 nodes give zero (5%, global), attributed over 7 texts" in text
    for words in ("0.900 → 0.450", "50.0%", "(2 seeds)", "S-L less S-H +0.360, 95% interval +0.100 to +0.500"):
        assert words in text


def test_the_map_has_both_ends_and_the_profile() -> None:
    *maps, profile = density_charts(SUPPRESSED)
    assert [chart.alt for chart in maps] == ["highest 5% of all nodes", "lowest 5% of all nodes"]
    for chart, shares in zip(maps, (VOTES, VOTES[::-1]), strict=True):
        assert 10 ** numpy.nan_to_num(numpy.array(chart.figure.data[0].z, float), nan=-99) == pytest.approx(
            numpy.array(shares)
        )
    assert maps[0].figure.layout.yaxis.ticktext == ("1", "3")
    assert profile.figure.data[0].y == (1.0, 0.5)


LAYER = {"first": 4, "second": 4, "common": 3, "share": 0.75, "chance": 0.4}
NONE = {"first": 0, "second": 0, "common": 0, "share": None, "chance": None}
OVERLAP: dict[str, Any] = {
    "first": {"name": "paper", "texts": 7},
    "second": {"name": "current", "texts": 5},
    "by_layer": [{"layer": 1, **LAYER}, {"layer": 3, **NONE}],
    "all": LAYER,
}


def test_overlaps_are_told_layer_by_layer() -> None:
    text = said(print_overlap, OVERLAP)
    lines = [line.split() for line in text.splitlines()]
    assert ["1", "4", "4", "3", "75.0%", "40.0%"] in lines
    assert ["3", "0", "0", "0", "–", "–"] in lines
    assert ["all", "4", "4", "3", "75.0%", "40.0%"] in lines
    assert "second: current, 5 texts" in text


def test_overlaps_are_drawn_with_chance() -> None:
    (chart,) = overlap_charts(OVERLAP)
    bars, chance = chart.figure.data
    assert (bars.y, chance.y) == ((0.75, 0.0), (0.4, None))
    assert chart.figure.layout.xaxis.ticktext == ("1", "3: none")
    assert chart.figure.layout.yaxis.range == (0, 1)
