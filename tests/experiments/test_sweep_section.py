"""A grid is the product of its axes as points, with a baseline beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.pipeline.support import keeptune

from keeptune.core.artefact import read_json
from keeptune.core.errors import RecipeError
from keeptune.experiments.plan_runs import list_runs, load_sweep
from keeptune.experiments.sweep_section import point_entries, read_sweep

Write = Callable[..., Path]


def names(section: Any) -> list[str]:
    return [point["name"] for point in read_sweep(section, "recipe")[0]]


def test_points_are_the_product_in_order() -> None:
    points, about = read_sweep({"grid": {"method.strength": [0.1, 1], "method.batches": [1, 2, 3]}}, "recipe")
    assert [point["name"] for point in points][:4] == [
        "strength 0.1, batches 1",
        "strength 0.1, batches 2",
        "strength 0.1, batches 3",
        "strength 1, batches 1",
    ]
    assert points[5] == {"name": "strength 1, batches 3", "method.strength": 1, "method.batches": 3}
    assert about["grid"]["cells"]["strength 1, batches 3"] == [1, 2]
    axes = [{"key": "method.strength", "values": [0.1, 1]}, {"key": "method.batches", "values": [1, 2, 3]}]
    assert about["grid"]["axes"] == axes


def test_one_axis_of_numbers_has_places() -> None:
    assert [p["x"] for p in read_sweep({"grid": {"method.rank": [2, 4]}}, "recipe")[0]] == [2, 4]
    assert all("x" not in p for p in read_sweep({"grid": {"method": ["lora", "dora"]}}, "recipe")[0])
    assert all("x" not in p for p in read_sweep({"grid": {"allow_pickle": [True, False]}}, "recipe")[0])


def test_names_tell_values_apart() -> None:
    assert names({"grid": {"method.rank": [2], "penalties.0.rank": [1]}}) == ["method.rank 2, penalties.0.rank 1"]
    assert names({"grid": {"layers": [[0, 1], None]}}) == ["layers 0,1", "layers none"]
    assert names({"grid": {"method": [{"name": "lora", "rank": 2}]}}) == ["method name lora rank 2"]
    assert names({"grid": {"train.learning_rate": [1e-3, 0.00012]}}) == ["learning_rate 0.001", "learning_rate 0.00012"]
    with pytest.raises(RecipeError, match="two entries called"):
        point_entries(read_sweep({"grid": {"task.prompt": ["{a}:", "{a}?"]}}, "recipe")[0], "recipe")


def test_a_baseline_is_a_point_or_settings() -> None:
    grid = {"method.rank": [2, 4]}
    points, about = read_sweep({"grid": grid, "baseline": {"method": "lora"}}, "recipe")
    assert points[-1] == {"name": "baseline", "method": "lora"}
    assert about["baseline"] == "baseline"
    listed = [{"name": "full", "method": "full"}]
    points, about = read_sweep({"grid": grid, "points": listed, "baseline": "full"}, "recipe")
    assert ([p["name"] for p in points], about["baseline"]) == (["rank 2", "rank 4", "full"], "full")
    assert read_sweep({"grid": grid, "baseline": "rank 4"}, "recipe")[1]["baseline"] == "rank 4"
    points, about = read_sweep({"points": listed, "baseline": {}}, "recipe")
    assert (points, about) == ([*listed, {"name": "baseline"}], {"baseline": "baseline"})


@pytest.mark.parametrize(
    ("section", "marks"),
    [
        ({"gird": {}}, ["sweep.gird", '"grid"']),
        ({"grid": {}}, ["sweep.grid", "{}"]),
        ({"grid": [1]}, ["sweep.grid", "[1]"]),
        ({"grid": {"method.rank": 2}}, ["sweep.grid.method.rank", "got 2"]),
        ({"grid": {"method.rank": []}}, ["sweep.grid.method.rank"]),
        ({"grid": {"method.rank": [2, 2]}}, ["different values"]),
        ({"grid": {"method.rank": [2]}, "points": {}}, ["sweep.points"]),
        ({"grid": {"method.rank": [2]}, "baseline": "rank 3"}, ["sweep.baseline", '"rank 2"']),
        ({"grid": {"method.rank": [2]}, "baseline": ["a"]}, ["sweep.baseline"]),
        ({"baseline": "a"}, ["sweep.baseline", "no point"]),
    ],
)
def test_wrong_grids(section: Any, marks: list[str]) -> None:
    with pytest.raises(RecipeError) as raised:
        read_sweep(section, "recipe")
    for mark in marks:
        assert mark in str(raised.value)


@pytest.mark.parametrize(
    ("section", "marks"),
    [
        ({}, ["key sweep"]),
        ({"grid": {"method.rnak": [2]}}, ["rnak", '"rank"']),
        ({"grid": {"train.seed": [2]}}, ["`seeds`"]),
        ({"grid": {"method.rank": [2]}, "points": [{"name": "rank 2"}]}, ['called "rank 2" and "rank 2"']),
        ({"grid": {"task.prompt": ["{question}" + "x" * 90]}}, ["at most 80"]),
    ],
)
def test_points_of_a_grid_are_checked_as_others_are(write_sweep: Write, section: Any, marks: list[str]) -> None:
    with pytest.raises(RecipeError) as raised:
        list_runs(load_sweep(write_sweep(sweep=section)))
    for mark in marks:
        assert mark in str(raised.value)


def test_a_grid_gives_benefits_over_its_baseline(
    write_sweep: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = {"train.learning_rate": [0.01, 0.1], "method.rank": [1, 2]}
    recipe = write_sweep(targets=["q_proj"], sweep={"grid": grid, "baseline": {"method.rank": 3}})
    said = keeptune("sweep", recipe, "--train.max_steps", "1", "--evaluate.1.role", "knowledge", capsys=capsys)
    assert said.code == 0, said.err
    record = read_json(tmp_path / "out" / "runs.json")
    # Not in the order of the alphabet, in which JSON would put keys.
    assert [axis["key"] for axis in record["grid"]["axes"]] == ["train.learning_rate", "method.rank"]
    after = {row["label"]: row["benchmarks"][0]["after"] for row in record["runs"]}
    table = record["benefit"][0]
    cell = table["cells"][1][0]["mean"]
    assert cell == pytest.approx(after["baseline"] - after["learning_rate 0.1, rank 1"])
    assert "stories (keep): nats/token over baseline" in said.out
    assert (tmp_path / "out" / "sweep.png").stat().st_size > 10_000
