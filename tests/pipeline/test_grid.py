"""A grid is the product of its axes as points, with a baseline beside them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.pipeline.support import keeptune, write_recipe

from keeptune.core.artefact import read_json
from keeptune.core.errors import PlanError, RecipeError
from keeptune.experiments.grid import read_section
from keeptune.experiments.sweep import load_sweep

Values = Callable[..., dict[str, Any]]
SIDE_BY_SIDE = [{"name": "mica", "rank": 2, "targets": ["down_proj"]}, {"name": "lora", "targets": ["q_proj"]}]


def names(section: Any) -> list[str]:
    return [point["name"] for point in read_section(section, "recipe")[0]]


def test_cells_are_the_product_in_order() -> None:
    points, about = read_section({"grid": {"method.strength": [0.1, 1], "method.batches": [1, 2, 3]}}, "recipe")
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
    assert [p["x"] for p in read_section({"grid": {"method.rank": [2, 4]}}, "recipe")[0]] == [2, 4]
    assert all("x" not in p for p in read_section({"grid": {"method": ["lora", "dora"]}}, "recipe")[0])
    assert all("x" not in p for p in read_section({"grid": {"low_memory": [True, False]}}, "recipe")[0])


def test_names_tell_values_apart() -> None:
    assert names({"grid": {"method.rank": [2], "penalties.0.rank": [1]}}) == ["method.rank 2, penalties.0.rank 1"]
    assert names({"grid": {"layers": [[0, 1], None]}}) == ["layers 0,1", "layers none"]
    assert names({"grid": {"method": [{"name": "lora", "rank": 2}]}}) == ["method name lora rank 2"]
    assert names({"grid": {"train.learning_rate": [1e-3, 0.00012]}}) == ["learning_rate 0.001", "learning_rate 0.00012"]
    with pytest.raises(RecipeError, match="two cells"):
        read_section({"grid": {"method": [SIDE_BY_SIDE, [part | {"rank": 4} for part in SIDE_BY_SIDE]]}}, "recipe")
    with pytest.raises(RecipeError, match="two cells"):
        read_section({"grid": {"task.prompt": ["{a}:", "{a}?"]}}, "recipe")


def test_methods_side_by_side_are_one_value_of_an_axis(recipe_values: Values, tmp_path: Path) -> None:
    points, about = read_section({"grid": {"method": ["lora", SIDE_BY_SIDE]}}, "recipe")
    assert [point["name"] for point in points] == ["method lora", "method mica+lora"]
    assert about["grid"]["cells"] == {"method lora": [0], "method mica+lora": [1]}
    grid = {"grid": {"method": ["lora", SIDE_BY_SIDE]}, "points": [{"name": "more", "method.1.rank": 4}]}
    given = recipe_values(method=SIDE_BY_SIDE, sweep=grid)
    plain, both, more = load_sweep(write_recipe(tmp_path / "recipe.yaml", given)).points
    assert plain.recipes[0].method == {"name": "lora"}
    assert both.recipes[0].method == SIDE_BY_SIDE
    assert more.recipes[0].method == [SIDE_BY_SIDE[0], SIDE_BY_SIDE[1] | {"rank": 4}]
    wrong = recipe_values(method=SIDE_BY_SIDE, sweep=[{"name": "a", "method.0.targets": ["donw_proj"]}])
    with pytest.raises(PlanError, match='sweep point a, targets: donw_proj.*"down_proj"'):
        load_sweep(write_recipe(tmp_path / "wrong.yaml", wrong))


def test_a_baseline_is_a_point_or_settings() -> None:
    grid = {"method.rank": [2, 4]}
    points, about = read_section({"grid": grid, "baseline": {"method": "lora"}}, "recipe")
    assert points[-1] == {"name": "baseline", "method": "lora"}
    assert about["baseline"] == "baseline"
    listed = [{"name": "full", "method": "full"}]
    points, about = read_section({"grid": grid, "points": listed, "baseline": "full"}, "recipe")
    assert ([p["name"] for p in points], about["baseline"]) == (["rank 2", "rank 4", "full"], "full")
    assert read_section({"grid": grid, "baseline": "rank 4"}, "recipe")[1]["baseline"] == "rank 4"
    points, about = read_section({"points": listed, "baseline": {}}, "recipe")
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
        read_section(section, "recipe")
    for mark in marks:
        assert mark in str(raised.value)


@pytest.mark.parametrize(
    ("section", "marks"),
    [
        ({}, ["key sweep"]),
        ({"grid": {"method.rnak": [2]}}, ["rnak", '"rank"']),
        ({"grid": {"train.seed": [2]}}, ["`seeds`"]),
        ({"grid": {"method.rank": [2]}, "points": [{"name": "rank 2"}]}, ['"rank 2" twice']),
        ({"grid": {"task.prompt": ["{question}" + "x" * 90]}}, ["at most 80"]),
    ],
)
def test_cells_are_checked_as_points_are(recipe_values: Values, tmp_path: Path, section: Any, marks: list[str]) -> None:
    given = recipe_values()
    del given["train"]["seed"]
    with pytest.raises(RecipeError) as raised:
        load_sweep(write_recipe(tmp_path / "grid.yaml", given | {"sweep": section}))
    for mark in marks:
        assert mark in str(raised.value)


def test_a_grid_gives_benefits_over_its_baseline(
    recipe_values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = recipe_values(targets=["q_proj"])
    given["train"] = {k: v for k, v in given["train"].items() if k != "seed"} | {"max_steps": 1}
    given["evaluate"] = given["evaluate"][:1]
    grid = {"train.learning_rate": [0.01, 0.1], "method.rank": [1, 2]}
    recipe = write_recipe(tmp_path / "grid.yaml", given | {"sweep": {"grid": grid, "baseline": {"method.rank": 3}}})
    said = keeptune("sweep", recipe, capsys=capsys)
    assert said.code == 0, said.err
    record = read_json(tmp_path / "out" / "sweep.json")
    # Not in the order of the alphabet, in which JSON would put keys.
    assert [axis["key"] for axis in record["grid"]["axes"]] == ["train.learning_rate", "method.rank"]
    after = {row["name"]: row["benchmarks"][0]["after"] for row in record["rows"]}
    (table,) = record["benefit"]
    cell = table["cells"][1][0]["mean"]
    assert cell == pytest.approx(after["baseline"] - after["learning_rate 0.1, rank 1"])
    assert "stories (keep): nats/token over baseline" in said.out
    assert (tmp_path / "out" / "sweep.png").stat().st_size > 10_000
