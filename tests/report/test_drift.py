"""The figure of penalties: which runs it shows, and that its lines are the numbers of the record."""

from __future__ import annotations

from typing import Any

import pytest

from keeptune.core.errors import ArtefactError
from keeptune.report.pages.layer_charts import penalties
from keeptune.report.pages.run_page import render_html
from keeptune.report.records import as_report


def penalised(report: dict[str, Any]) -> dict[str, Any]:
    """The second method held: its penalty rises, layer 1 moves twice as far as layer 0."""
    for run in report["methods"]:
        if run["name"] == "lora-null-v1":
            for row in run["loss"]:
                row |= {
                    "penalty": 0.01 * row["step"],
                    "penalty/l2": 0.01 * row["step"],
                    "drift/layer_0": 0.02 * row["step"],
                    "drift/layer_1": 0.04 * row["step"],
                    "drift/layer_-1": 9.0,
                }
    return report


def test_without_penalties_there_is_no_figure(full: dict[str, Any], minimal: dict[str, Any]) -> None:
    assert penalties(as_report(full)) == penalties(as_report(minimal)) == []


def test_the_record_keeps_penalty_and_drift_of_every_step(full: dict[str, Any]) -> None:
    runs = as_report(penalised(full)).runs
    held = [run for run in runs if run.penalised]
    assert {run.name for run in held} == {"lora-null-v1"}
    assert [(row.step, row.penalty, dict(row.layers)) for row in held[0].penalised][:2] == [
        (0, 0.0, {0: 0.0, 1: 0.0}),
        (1, 0.01, {0: 0.02, 1: 0.04}),
    ]


def test_a_penalty_that_is_no_number_is_refused(full: dict[str, Any]) -> None:
    report = penalised(full)
    report["methods"][2]["loss"][3]["penalty"] = "much"
    with pytest.raises(ArtefactError, match=r"loss\.3\.penalty"):
        as_report(report)


def test_lines_are_the_numbers_of_the_record(full: dict[str, Any]) -> None:
    costs, drift = penalties(as_report(penalised(full)))
    assert costs.alt == "Task loss and penalty: lora-null-v1"
    lines = {trace.name: list(trace.y) for trace in costs.figure.data}
    assert lines["penalty"] == pytest.approx([0.01 * step for step in range(20)])
    assert lines["task loss"] == pytest.approx([2 / (1 + step) for step in range(20)])
    (layers,) = drift.figure.data
    assert [row[-1] for row in layers.z] == pytest.approx([0.38, 0.76])


def test_a_penalty_that_is_measured_is_drawn_in_nats_beside_its_budget(full: dict[str, Any]) -> None:
    for row in penalised(full)["methods"][2]["loss"]:
        if row["step"] % 2 == 0:
            row |= {"kl_to_base": 0.001 * row["step"], "kl_held_out": 0.002 * row["step"], "kl_budget": 0.01}
    drawn, _ = penalties(as_report(full))
    lines = {trace.name: (list(trace.x), list(trace.y)) for trace in drawn.figure.data}
    steps = list(range(0, 20, 2))
    assert lines["texts trained on"] == (steps, pytest.approx([0.001 * step for step in steps]))
    assert lines["held-out texts"] == (steps, pytest.approx([0.002 * step for step in steps]))
    assert lines["budget"] == (steps, [0.01] * 10)


def test_the_page_has_a_section_for_it(full: dict[str, Any]) -> None:
    assert "<h2>Penalties</h2>" not in render_html(full)
    assert "<h2>Penalties</h2>" in render_html(penalised(full))
