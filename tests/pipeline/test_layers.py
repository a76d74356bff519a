"""A study of layers is a sweep over the recipe's layers: shared runs, the right layers in each, and a table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.pipeline.support import keeptune, write_recipe

from keeptune.core.artefact import read_json
from keeptune.core.errors import KeeptuneError, PlanError, RecipeError
from keeptune.core.plan import Plan
from keeptune.experiments.layers import load_study
from keeptune.experiments.sweep import Sweep

Values = Callable[..., dict[str, Any]]


@pytest.fixture
def write(recipe_values: Values, tmp_path: Path) -> Callable[..., Path]:
    """Write an ordinary recipe of two steps and one short benchmark per role."""

    def to_file(**changes: Any) -> Path:
        given = recipe_values(**changes)
        given["train"] = given["train"] | {"max_steps": 2, "learning_rate": 0.05}
        given["evaluate"] = given["evaluate"][:2]
        return write_recipe(tmp_path / "layers.yaml", given)

    return to_file


def settings(study: Sweep) -> list[tuple[str, float | None, Any]]:
    return [(point.name, point.x, point.settings["layers"]) for point in study.points]


def test_studies_train_the_layers_they_name_and_share_runs(
    write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, words = tmp_path / "out", ("--layers", "[1, 3]")
    said = keeptune("layers", write(), "--study", "single", *words, capsys=capsys)
    assert said.code == 0, said.err
    names = {"layer 1": {1}, "layer 3": {3}, "layers 1+3": {1, 3}}
    assert {path.name for path in out.iterdir()} == {*(f"{name}-seed0" for name in names), "single"}
    for name, layers in names.items():
        plan = Plan.load(out / f"{name}-seed0" / "plan")
        assert {t.target.layer for t in plan.targets} == layers
    assert {p.name for p in (out / "single").iterdir()} == {"layers.json", "layers.png", "report.json", "report.html"}
    record = read_json(out / "single" / "layers.json")
    assert (record["study"], record["layers"], record["failed"]) == ("single", [1, 3], {})
    assert [row["x"] for row in record["rows"]] == [1.0, 3.0, None]
    lines = said.out.splitlines()
    assert [line.split()[:2] for line in lines[2:4]] == [["layer", "1"], ["layer", "3"]]
    item = record["rows"][0]["benchmarks"][0]
    (told,) = (r for r in record["summary"] if (r["point"], r["benchmark"]) == ("layer 1", "stories"))
    assert told["mean"] == pytest.approx(item["after"] - item["before"])
    assert told["measure"] == "drop"
    assert f"{told['mean']:+.3f}".replace("-", "−") in lines[2]

    trained = {path: path.stat().st_mtime_ns for path in out.glob("*/trained/train.json")}
    said = keeptune("layers", tmp_path / "layers.yaml", "--study", "bottom", *words, capsys=capsys)
    assert said.code == 0, said.err
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/trained/train.json")} == trained, "all shared"
    record = read_json(out / "bottom" / "layers.json")
    assert [(row["name"], row["x"]) for row in record["rows"]] == [("layer 1", 1.0), ("layers 1+3", 2.0)]
    assert said.out.splitlines()[2].split()[0] == "none"
    assert (out / "bottom" / "layers.png").stat().st_size > 10_000


def test_bottom_and_top_count_from_their_end(write: Callable[..., Path]) -> None:
    path = write(seeds=[3, 4])
    bottom = load_study(path, "bottom")
    assert settings(bottom) == [
        ("layer 0", 1, [0]),
        ("layers 0-1", 2, [0, 1]),
        ("layers 0-2", 3, [0, 1, 2]),
        ("layers 0-3", 4, [0, 1, 2, 3]),
        ("layers 0-4", 5, [0, 1, 2, 3, 4]),
    ]
    assert list(bottom.points[0].recipes) == [3, 4]
    top = load_study(path, "top", numbers=[3, 1])
    assert settings(top) == [("layer 4", 1, [4]), ("layers 2-4", 3, [2, 3, 4])]
    assert top.points[1].recipes[4].output.name == "layers 2-4-seed4"
    assert load_study(path, "top", {"layers": [0, 2, 3]}, [2]).points[0].settings["layers"] == [2, 3]
    assert settings(load_study(path, "single", {"layers": [2]})) == [("layer 2", 2, [2])], "nothing to compare with"


def test_layers_are_those_with_targets(write: Callable[..., Path]) -> None:
    assert len(load_study(write(targets=["q_proj"]), "single").points) == 6


def test_a_failing_cell_is_told_and_the_others_go_on(
    write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from keeptune.studies import sweep

    run = sweep.run

    def breaks(recipe: Any) -> Any:
        if recipe.layers == [4]:
            raise RuntimeError("out of memory")
        return run(recipe)

    monkeypatch.setattr("keeptune.experiments.sweep.run", breaks)
    said = keeptune("layers", write(layers=[3, 4]), "--study", "single", capsys=capsys)
    assert said.code == 1
    assert "layer 4-seed0: RuntimeError: out of memory" in said.err
    record = read_json(tmp_path / "out" / "single" / "layers.json")
    assert [row["name"] for row in record["rows"]] == ["layer 3", "layers 3-4"]


def test_dry_run_lists_the_runs(write: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    said = keeptune("layers", write(), "--study", "top", "--numbers", "[2,4]", "--dry-run", capsys=capsys)
    assert said.code == 0
    assert "layers: [3, 4]" in said.out
    assert said.out.rstrip().endswith(f"2 runs below {tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("study", "changes", "numbers", "kind", "marks"),
    [
        ("middle", {}, None, RecipeError, ["--study", "middle", "single, bottom, top"]),
        ("single", {}, [2], RecipeError, ["--numbers", "--layers"]),
        ("top", {}, [0, 2], RecipeError, ["--numbers", "got 0", "1 to 5"]),
        ("top", {}, [6], RecipeError, ["got 6"]),
        ("top", {}, [], RecipeError, ["none"]),
        ("top", {"layers": [7]}, None, PlanError, ["got 7", "5 blocks"]),
        ("single", {"method": "full"}, None, PlanError, ["every weight"]),
        ("single", {"targets": ["q"]}, None, PlanError, ["q_proj"]),
        ("single", {"sweep": [{"name": "a"}]}, None, RecipeError, ["keeptune sweep"]),
        ("single", {"seeds": [0, 0]}, None, RecipeError, ["seeds"]),
        ("single", {"metod": "lora"}, None, RecipeError, ["metod", "method"]),
    ],
)
def test_wrong_studies_are_refused_before_the_first_run(
    write: Callable[..., Path],
    tmp_path: Path,
    study: str,
    changes: dict[str, Any],
    numbers: list[int] | None,
    kind: type[KeeptuneError],
    marks: list[str],
) -> None:
    with pytest.raises(kind) as raised:
        load_study(write(**changes), study, numbers=numbers)
    for mark in marks:
        assert mark in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_numbers_are_whole(write: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    said = keeptune("layers", write(), "--study", "top", "--numbers", "2,x", capsys=capsys)
    assert (said.code, "2,x" in said.err) == (2, True)


def test_many_layers_still_make_a_folder_name() -> None:
    from keeptune.experiments.layers import _point

    odd, other = _point(list(range(1, 80, 2))), _point([*range(1, 77, 2), 78, 79])
    assert len(odd["name"]) < 60
    assert odd["name"] != other["name"]
