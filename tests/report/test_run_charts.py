"""The figures of a run's page hold the report's numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest

from keeptune.report.grids import Cell, bar
from keeptune.report.pages import layer_charts, run_charts
from keeptune.report.pages.charts import heat_map, hover, mark, plain, role_map
from keeptune.report.pages.run_tables import benchmark_tables
from keeptune.report.records import as_report


def with_everything(full: dict[str, Any]) -> dict[str, Any]:
    """Add penalties with drift, importances, single numbers and votes."""
    for run in full["methods"]:
        for row in run["loss"]:
            row |= {"penalty": 0.1, "drift/layer_0": 0.01, "drift/layer_1": 0.02}
        for row in run.get("plan", []):
            row["evidence"] |= {"importance": [0.01 * (1 + row["layer"])], "frozen_energy": [0.9], "votes": [0, 3, 1]}
    return full


def test_every_kind_of_figure_is_drawn(full: dict[str, Any]) -> None:
    report = as_report(with_everything(full))
    charts = [
        run_charts.tradeoff(report),
        run_charts.losses(report),
        *run_charts.relations(report),
        *layer_charts.penalties(report),
        *layer_charts.ranks(report),
        *layer_charts.votes(report),
    ]
    names = [chart.name for chart in charts if chart is not None]
    assert len(names) == len(charts) == len(set(names))
    kinds = {name.rstrip("0123456789-") for name in names}
    assert kinds == {
        *("tradeoff", "losses", "relations", "penalty", "drift", "ranks", "importances", "evidence", "votes")
    }


def test_a_point_tells_its_setting_and_scores(full: dict[str, Any]) -> None:
    chart = run_charts.tradeoff(as_report(full))
    assert chart is not None
    means = [trace for trace in chart.figure.to_plotly_json()["data"] if trace["name"] == "lora"]
    assert means[0]["x"] == [pytest.approx(0.831)]
    assert means[0]["y"] == [pytest.approx(73.1)]
    (words,) = means[0]["hovertext"]
    for part in (
        "<b>lora</b>",
        "learned: 0.831",
        "kept: 73.1",
        "seeds: 0, 1",
        "rank: 8",
        "learning rate: 0.0002",
        "K: 0.7",
    ):
        assert part in words
    seeds = [trace for trace in chart.figure.to_plotly_json()["data"] if trace["name"] == "lora, seeds"]
    assert seeds[0]["x"] == pytest.approx([0.83, 0.832])
    assert "lora, seed 1" in seeds[0]["hovertext"][1]
    base = chart.figure.to_plotly_json()["data"][-1]
    assert (base["name"], base["x"], base["y"]) == ("base model", [pytest.approx(0.05)], [100.0])


def test_error_bars_end_at_the_interval(make: Any) -> None:
    chart = run_charts.tradeoff(as_report(make(("lora", 0.7, 0.8))))
    assert chart is not None
    trace = chart.figure.to_plotly_json()["data"][0]
    assert trace["error_x"]["array"] == [pytest.approx(0.04)]
    assert trace["error_y"]["arrayminus"] == [pytest.approx(3.0)]


def test_relations_of_one_method_are_bars_and_of_several_a_map(full: dict[str, Any], make: Any) -> None:
    (several,) = run_charts.relations(as_report(full))
    assert several.figure.to_plotly_json()["data"][0]["type"] == "heatmap"
    assert several.figure.to_plotly_json()["data"][0]["z"][0] == pytest.approx([29.9, 7.9, 22.9])
    (single,) = run_charts.relations(as_report(make(("lora", 0.7, 0.8))))
    assert [row[0] for row in single.figure.data[0].z] == pytest.approx([33.0, 32.0, 31.0, 30.0])


def test_drift_is_a_map_of_layers_by_steps(full: dict[str, Any]) -> None:
    chart = next(c for c in layer_charts.penalties(as_report(with_everything(full))) if c.name == "drift0")
    trace = chart.figure.to_plotly_json()["data"][0]
    assert [row[0] for row in trace["z"]] == [0.01, 0.02]
    assert chart.figure.to_plotly_json()["layout"]["yaxis"]["autorange"] == "reversed"


def test_importances_are_coloured_by_logarithm_and_say_the_number(full: dict[str, Any]) -> None:
    charts = layer_charts.ranks(as_report(with_everything(full)))
    trace = next(chart for chart in charts if chart.name.startswith("importances")).figure.to_plotly_json()["data"][0]
    assert trace["z"][0] == pytest.approx([-2.0, math.log10(0.02)])
    assert trace["text"][0] == ["1.0e-02", "2.0e-02"]


def test_targets_outside_any_block_have_no_column() -> None:
    (chart,) = role_map("ranks", "", [(-1, "lm_head", 4.0), (0, "q_proj", 8.0), (1, "q_proj", 2.0)], "cool", "rank")
    assert chart.figure.data[0].z == ([8.0, 2.0],) and list(chart.figure.layout.xaxis.ticktext) == ["0", "1"]


def test_looks_differ_in_more_than_colour() -> None:
    looks = [mark(index) for index in range(16)]
    assert len({look.symbol for look in looks[:8]}) == 8
    assert all(one.dash != two.dash for one, two in zip(looks, looks[1:], strict=False))
    assert len({(look.colour, look.symbol) for look in map(mark, range(136))}) == 136


def test_texts_for_plotly_hold_no_markup() -> None:
    assert plain("<a href='x'>&\n") == "&lt;a href='x'&gt;&amp;"
    assert hover("<i>", [("a", None), ("<u>", "<script>")]) == "<b>&lt;i&gt;</b><br>&lt;u&gt;: &lt;script&gt;"
    figure = heat_map([[1.0]], (("y", ["<b>"]), ("x", ["<i>"])), "cool", "<s>")
    assert "<b>" not in str(figure) and "<i>" not in str(figure) and "<s>" not in str(figure)


def test_bars_point_to_the_better_side() -> None:
    loss = bar(-0.5, -0.75, -0.25, 1.0)
    assert (loss.kind, loss.start, loss.length, loss.low, loss.high) == ("loss", 52.0, 48.0, 28.0, 76.0)
    gain = bar(0.5, math.nan, math.nan, 1.0)
    assert (gain.kind, gain.start, gain.length, gain.low) == ("gain", 100.0, 48.0, None)


def test_a_rising_loss_points_to_the_worse_side(full: dict[str, Any]) -> None:
    tables = {kind.name: grid for kind, _, grid in benchmark_tables(as_report(full))}
    assert list(tables) == ["facts", "wiki", "tools"]
    (_, _, change), (_, _, task) = (tables[name].rows[0] for name in ("wiki", "tools"))
    assert isinstance(change, Cell) and isinstance(task, Cell) and change.bar and task.bar
    assert (change.main, change.bar.kind, task.bar.kind) == ("+0.135 nats/token", "loss", "gain")
