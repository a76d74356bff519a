"""A study of layers is a sweep over the recipe's layers: shared runs, the right layers in each, and a table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.pipeline.support import keeptune

from keeptune.core.artefact import read_json
from keeptune.core.errors import KeeptuneError, PlanError, RecipeError
from keeptune.core.plan import Plan
from keeptune.experiments.layer_studies import load_layer_study
from keeptune.experiments.plan_runs import Comparison, check_runs, list_runs

Write = Callable[..., Path]


def settings(study: Comparison) -> list[tuple[str, float | None, Any]]:
    return [(entry.label, entry.x, entry.settings["layers"]) for entry in study.entries]


def test_studies_train_the_layers_they_name_and_share_runs(
    write_sweep: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, words = tmp_path / "out", ("--layers", "[1, 3]")
    said = keeptune("layers", write_sweep(), "--study", "single", *words, capsys=capsys)
    assert said.code == 0, said.err
    names = {"layer-1": {1}, "layer-3": {3}, "layers-1-3": {1, 3}}
    for name, layers in names.items():
        plan = Plan.load(out / "runs" / f"{name}-seed0" / "plan")
        assert {t.target.layer for t in plan.targets} == layers
    files = {"runs.json", "runs.parquet", "front.json", "report.html", "layers.png"}
    assert {path.name for path in (out / "single").iterdir() if path.is_file()} == files
    record = read_json(out / "single" / "runs.json")
    assert (record["study"], record["layers"]) == ("single", [1, 3])
    assert [row["x"] for row in record["runs"]] == [1.0, 3.0, None]
    page = (out / "single" / "report.html").read_text(encoding="utf-8")
    assert "layers 1+3" in page

    trained = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/trained/train.json")}
    said = keeptune("layers", tmp_path / "recipe.yaml", "--study", "bottom", *words, capsys=capsys)
    assert said.code == 0, said.err
    assert {path: path.stat().st_mtime_ns for path in out.glob("runs/*/trained/train.json")} == trained, "all shared"
    record = read_json(out / "bottom" / "runs.json")
    assert [(row["label"], row["x"]) for row in record["runs"]] == [("layer 1", 1.0), ("layers 1+3", 2.0)]
    assert (out / "bottom" / "layers.png").stat().st_size > 10_000


def test_bottom_and_top_count_from_their_end(write_sweep: Write) -> None:
    path = write_sweep(seeds=[3, 4])
    bottom = load_layer_study(path, "bottom")
    assert settings(bottom) == [
        ("layer 0", 1, [0]),
        ("layers 0-1", 2, [0, 1]),
        ("layers 0-2", 3, [0, 1, 2]),
        ("layers 0-3", 4, [0, 1, 2, 3]),
        ("layers 0-4", 5, [0, 1, 2, 3, 4]),
    ]
    assert bottom.section.seeds == [3, 4]
    top = load_layer_study(path, "top", numbers=[3, 1])
    assert settings(top) == [("layer 4", 1, [4]), ("layers 2-4", 3, [2, 3, 4])]
    assert list_runs(top)[3].recipe.output.name == "layers-2-4-seed4"
    assert load_layer_study(path, "top", {"layers": [0, 2, 3]}, [2]).entries[0].settings["layers"] == [2, 3]
    assert settings(load_layer_study(path, "single", {"layers": [2]})) == [("layer 2", 2, [2])], (
        "nothing to compare with"
    )


def test_layers_are_those_with_targets(write_sweep: Write) -> None:
    assert len(load_layer_study(write_sweep(targets=["q_proj"]), "single").entries) == 6


def test_dry_run_lists_the_runs(write_sweep: Write, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    said = keeptune("layers", write_sweep(), "--study", "top", "--numbers", "[2,4]", "--dry-run", capsys=capsys)
    assert said.code == 0
    assert "layers: [3, 4]" in said.out
    assert said.out.rstrip().endswith(f"2 runs below {tmp_path / 'out' / 'runs'}")
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
    write_sweep: Write,
    tmp_path: Path,
    study: str,
    changes: dict[str, Any],
    numbers: list[int] | None,
    kind: type[KeeptuneError],
    marks: list[str],
) -> None:
    with pytest.raises(kind) as raised:
        comparison = load_layer_study(write_sweep(**changes), study, numbers=numbers)
        check_runs(comparison, list_runs(comparison))
    for mark in marks:
        assert mark in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_numbers_are_whole(write_sweep: Write, capsys: pytest.CaptureFixture[str]) -> None:
    said = keeptune("layers", write_sweep(), "--study", "top", "--numbers", "2,x", capsys=capsys)
    assert (said.code, "2,x" in said.err) == (2, True)


def test_many_layers_still_make_a_folder_name() -> None:
    from keeptune.experiments.layer_studies import _point

    odd, other = _point(list(range(1, 80, 2))), _point([*range(1, 77, 2), 78, 79])
    assert len(odd["name"]) < 60
    assert odd["name"] != other["name"]
