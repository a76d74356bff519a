"""A sweep is its runs: each point and seed an ordinary run, all points checked first, failures told at the end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.pipeline.support import keeptune, recipe_of, write_recipe

from keeptune.core.artefact import read_json
from keeptune.core.errors import KeeptuneError, PlanError, RecipeError
from keeptune.experiments.sweep import load_sweep, run_sweep
from keeptune.pipeline.run import run

Values = Callable[..., dict[str, Any]]
POINTS = [{"name": "rank 2", "x": 2, "method.rank": 2}, {"name": "rank 4", "x": 4, "method.rank": 4}]


@pytest.fixture
def write(recipe_values: Values, tmp_path: Path) -> Callable[..., Path]:
    """Write a recipe with a sweep of one short benchmark per role and two steps."""

    def to_file(points: Any = POINTS, **changes: Any) -> Path:
        given = recipe_values(**changes)
        given["train"] = given["train"] | {"max_steps": 2}
        del given["train"]["seed"]
        given["evaluate"] = given["evaluate"][:2]
        return write_recipe(tmp_path / "sweep.yaml", given | {"sweep": points})

    return to_file


def test_a_sweep_gives_what_its_runs_give(write: Callable[..., Path], tmp_path: Path) -> None:
    points = [POINTS[0], {"name": "full", "method": "full", "train.learning_rate": 1e-3}]
    recipe = write(points, seeds=[0, 3])
    loaded = load_sweep(recipe)
    swept = run_sweep(loaded)
    assert swept.failed == {}
    assert swept.figure
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        *(f"{name}-seed{seed}" for name in ("rank 2", "full") for seed in (0, 3)),
        *("report.json", "report.html", "sweep.json", "sweep.png"),
    }
    rows = read_json(out / "sweep.json")["rows"]
    keys = [(row["name"], row["x"], row["seed"]) for row in rows]
    assert keys == [(n, x, s) for n, x in (("rank 2", 2.0), ("full", None)) for s in (0, 3)]

    values = json.loads(recipe.read_text(encoding="utf-8"))
    del values["sweep"], values["seeds"]
    alone = values | {"method": values["method"] | {"rank": 2}, "output": str(tmp_path / "alone")}
    alone["train"] = values["train"] | {"seed": 3}
    (entry,) = run(recipe_of(alone))["methods"]
    row = rows[1]
    assert row["K"] == entry["K"]
    assert [b["after"] for b in row["benchmarks"]] == [b["after"] for b in entry["benchmarks"]]
    assert row["trained_parameters"] == entry["trained_parameters"]
    assert rows[0]["benchmarks"] != row["benchmarks"], "seeds differ"
    report = read_json(out / "report.json")
    assert [m["label"] for m in report["methods"]] == ["rank 2", "rank 2", "full", "full"]
    assert [(row["K"], row["T"], row["KT"]) for row in rows] == [(m["K"], m["T"], m["KT"]) for m in report["methods"]]

    trained = {path: path.stat().st_mtime_ns for path in out.glob("*/trained/train.json")}
    assert len(trained) == 4
    run_sweep(loaded)
    assert {path: path.stat().st_mtime_ns for path in trained} == trained, "finished runs are not repeated"


def test_a_failing_point_is_told_and_the_others_go_on(
    write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    points = [{"name": "too much", "method.rank": 4000}, POINTS[0]]
    said = keeptune("sweep", write(points), capsys=capsys)
    assert said.code == 1
    assert "rank 2" in said.out
    assert said.out.rstrip().endswith(f"figure: {tmp_path / 'out' / 'sweep.png'}")
    assert f"failed: {tmp_path / 'out' / 'too much-seed0'}: method lora" in said.err
    assert "rank 4000" in said.err
    record = read_json(tmp_path / "out" / "sweep.json")
    assert [row["name"] for row in record["rows"]] == ["rank 2"]
    assert list(record["failed"]) == [str(tmp_path / "out" / "too much-seed0")]


def test_when_all_fail_there_is_no_report(
    write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = keeptune("sweep", write([{"name": "a", "method.rank": 4000}]), capsys=capsys)
    assert (said.code, said.out) == (1, "")
    assert "rank 4000" in said.err
    assert not (tmp_path / "out" / "report.json").exists()


def test_an_error_of_a_library_is_a_failure_too_and_a_bug_is_not(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load_sweep(write())

    def fail(_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("keeptune.experiments.sweep.run", fail)
    assert set(run_sweep(loaded).failed.values()) == {"RuntimeError: out of memory"}
    monkeypatch.setattr("keeptune.experiments.sweep.run", lambda _: {}["no such key"])
    with pytest.raises(KeyError):
        run_sweep(loaded)


def test_dry_run_lists_the_points_and_writes_nothing(
    write: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = keeptune("sweep", write(seeds=[0, 1]), "--dry-run", "--output", tmp_path / "other", capsys=capsys)
    assert said.code == 0
    assert "method.rank: 2" in said.out
    assert f"4 runs below {tmp_path / 'other'}" in said.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep.yaml"]


def test_points_set_sections_before_parts_and_do_not_leak(write: Callable[..., Path]) -> None:
    points = [
        {"name": "b", "train.weight_decay": 0.1},
        {"name": "a", "method.rank": 2, "method": "lora-null", "targets": ["q_proj"]},
    ]
    loaded = load_sweep(write(points, seeds=[4]))
    b, a = (point.recipes[4] for point in loaded.points)
    assert a.method == {"name": "lora-null", "rank": 2}
    assert b.method["name"] == "lora"
    assert (a.targets, b.targets) == (["q_proj"], None)
    assert a.train["seed"] == b.train["seed"] == 4
    assert ("weight_decay" in a.train, b.train["weight_decay"]) == (False, 0.1)
    assert a.output != b.output
    assert a.store == b.store


def test_seeds_are_the_recipes_own_unless_told(write: Callable[..., Path]) -> None:
    assert list(load_sweep(write()).points[0].recipes) == [0]
    assert list(load_sweep(write(), {"train.seed": 5}).points[0].recipes) == [5]
    assert list(load_sweep(write(), {"seeds": [2, 1]}).points[0].recipes) == [2, 1]


@pytest.mark.parametrize(
    ("points", "kind", "marks"),
    [
        (None, RecipeError, ["key sweep", "got nothing"]),
        ([], RecipeError, ["key sweep", "an empty list"]),
        ({"name": "a"}, RecipeError, ["key sweep"]),
        (["a"], RecipeError, ["key sweep"]),
        ([{"method.rank": 2}], RecipeError, ["point 1", "no name"]),
        ([POINTS[0], {"name": 3}], RecipeError, ["point 2", "3"]),
        *(
            ([{"name": name}], RecipeError, ["point 1", repr(name)])
            for name in ("", "a/b", "..", ".a", "a.", "a ", "a\n", "a\\b", "a:b", "x" * 81)
        ),
        ([POINTS[0], POINTS[0]], RecipeError, ["point 2", '"rank 2" twice']),
        ([{"name": "a"}, {"name": "A"}], RecipeError, ["point 2", '"A" twice']),
        ([{"name": "a", "x": "left"}], RecipeError, ["point a", "'left'"]),
        ([{"name": "a", "x": True}], RecipeError, ["point a", "True"]),
        ([{"name": "a", "x": float("inf")}], RecipeError, ["point a", "inf"]),
        ([{"name": "a", "modle": "m"}], RecipeError, ["point a", "modle", '"model"']),
        ([{"name": "a", "method.rnak": 2}], RecipeError, ["point a", "method.rnak", '"rank"']),
        ([{"name": "a", "train.learning_rat": 2}], RecipeError, ["point a", "learning_rate"]),
        ([{"name": "a", "knowledge.exmples": 2}], RecipeError, ["point a", "examples"]),
        ([{"name": "a", "targets.q": 2}], RecipeError, ["point a", "key targets", '"q"']),
        ([{"name": "a", "model_.q": 2}], RecipeError, ["point a", "model_"]),
        ([{"name": "a", "device.q": 2}], RecipeError, ["point a", "key device.q"]),
        ([{"name": "a", 3: 2}], RecipeError, ["point a", "3"]),
        ([{"name": "a", "evaluate": []}], RecipeError, ["point a", "evaluate", "same benchmarks"]),
        ([{"name": "a", "evaluate.0.examples": 2}], RecipeError, ["point a", "evaluate.0.examples"]),
        ([{"name": "a", "train.seed": 2}], RecipeError, ["point a", "`seeds`"]),
        ([{"name": "a", "seeds": [2]}], RecipeError, ["point a", "seeds"]),
        ([{"name": "a", "output": "here"}], RecipeError, ["point a", "output"]),
        ([{"name": "a", "model": "m"}], RecipeError, ["point a", "one base"]),
        ([POINTS[0], {"name": "a", "layers": [0, 5]}], PlanError, ["point a", "got 5", "5 blocks"]),
        ([{"name": "a", "targets": ["q_prj"]}], PlanError, ["point a", '"q_proj"']),
        ([{"name": "a", "method": "full", "layers": [0]}], PlanError, ["point a", "every weight"]),
        ([{"name": "a", "method": "lora-null", "knowledge": None}], RecipeError, ["point a", "lora-null"]),
    ],
)
def test_wrong_sweeps_are_refused_before_the_first_run(
    write: Callable[..., Path], tmp_path: Path, points: Any, kind: type[KeeptuneError], marks: list[str]
) -> None:
    recipe = write([])
    values = json.loads(recipe.read_text(encoding="utf-8"))
    with pytest.MonkeyPatch.context() as patch:  # JSON cannot hold a key that is no text, YAML can
        patch.setattr("keeptune.experiments.sweep.read_values", lambda *_: values | {"sweep": points})
        with pytest.raises(kind) as raised:
            load_sweep(recipe)
    for mark in marks:
        assert mark in str(raised.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seeds", [[], 3, [0, 0], [-1], ["0"], [True], [1.0]])
def test_wrong_seeds(write: Callable[..., Path], seeds: Any) -> None:
    with pytest.raises(RecipeError, match="key seeds"):
        load_sweep(write(seeds=seeds))


def test_a_sweep_is_no_recipe_of_one_run(write: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    said = keeptune("plan", write(), capsys=capsys)
    assert said.code == 2
    assert "keeptune sweep" in said.err
