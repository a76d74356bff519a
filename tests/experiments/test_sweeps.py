"""A sweep is its runs: each point and seed an ordinary run, all points checked first, failures told at the end."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.pipeline.support import keeptune, recipe_of

from keeptune.core.artefact import read_json
from keeptune.core.errors import KeeptuneError, PlanError, RecipeError
from keeptune.experiments.engine import run_all
from keeptune.experiments.plan_runs import check_runs, list_runs, load_sweep
from keeptune.pipeline.reporting import write_report
from keeptune.pipeline.run import run

POINTS = [{"name": "rank 2", "x": 2, "method.rank": 2}, {"name": "rank 4", "x": 4, "method.rank": 4}]


Write = Callable[..., Path]


def test_a_sweep_gives_what_its_runs_give(
    write_sweep: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = {"name": "full", "method": "full", "train.learning_rate": 1e-3}
    recipe = write_sweep(sweep=[POINTS[0], {"name": "too much", "method.rank": 4000}, full], seeds=[0, 3])
    said = keeptune("sweep", recipe, capsys=capsys)
    assert said.code == 1, "a run failed"
    out = tmp_path / "out"
    assert said.out.rstrip().endswith(f"figure: {out / 'sweep.png'}")
    assert "failed: too-much-seed0: method lora" in said.err
    assert "rank 4000" in said.err
    record = read_json(out / "runs.json")
    assert record["recipe"]["sweep"][0] == POINTS[0], "the page can repeat it"
    rows = {row["name"]: row for row in record["runs"]}
    assert [(row["label"], row["x"], row["seed"], row["status"]) for row in rows.values()] == [
        (label, x, seed, status)
        for label, x, status in (("rank 2", 2.0, "done"), ("too much", None, "failed"), ("full", None, "done"))
        for seed in (0, 3)
    ]
    assert {path.name for path in out.iterdir() if path.is_file() and path.name[0] != "."} == {
        *("runs.json", "runs.parquet", "front.json", "report.html", "sweep.png")
    }

    values = json.loads(recipe.read_text(encoding="utf-8"))
    del values["sweep"], values["seeds"]
    alone = values | {"method": values["method"] | {"rank": 2}, "output": str(tmp_path / "alone")}
    alone["train"] = values["train"] | {"seed": 3}
    (entry,) = run(recipe_of(alone))["methods"]
    row = rows["rank-2-seed3"]
    assert row["K"] == entry["K"]
    assert [b["after"] for b in row["benchmarks"]] == [b["after"] for b in entry["benchmarks"]]
    assert row["trained_parameters"] == entry["trained_parameters"]
    assert rows["rank-2-seed0"]["benchmarks"] != row["benchmarks"], "seeds differ"
    joined = write_report([out / "runs" / name for name in rows if "too" not in name], tmp_path / "joined")
    same = [[m[key] for key in ("K", "T", "KT")] for m in joined["methods"]]
    assert [[r[key] for key in ("K", "T", "KT")] for r in rows.values() if r["status"] == "done"] == same

    # T and KT have no column: full fine-tuning of two steps scores 0 on the task.
    assert '<th scope="col">K</th>' in (out / "report.html").read_text(encoding="utf-8")

    trained = {path: path.stat().st_mtime_ns for path in out.glob("runs/*/trained/train.json")}
    assert len(trained) == 4
    keeptune("sweep", recipe, capsys=capsys)
    assert {path: path.stat().st_mtime_ns for path in trained} == trained, "finished runs are not repeated"


def test_when_all_fail_the_record_says_why(
    write_sweep: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = keeptune("sweep", write_sweep(sweep=[{"name": "a", "method.rank": 4000}]), capsys=capsys)
    assert said.code == 1
    assert "rank 4000" in said.err
    (row,) = read_json(tmp_path / "out" / "runs.json")["runs"]
    assert (row["status"], "rank 4000" in row["message"]) == ("failed", True)
    assert not (tmp_path / "out" / "sweep.png").exists()


def test_an_error_of_a_library_is_a_failure_too_and_a_bug_is_not(
    write_sweep: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    comparison = load_sweep(write_sweep(sweep=POINTS))
    specs = list_runs(comparison)

    def fail(_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("keeptune.experiments.single_run.start", fail)
    assert {o.message for o in run_all(comparison, specs).values()} == {"RuntimeError: out of memory"}
    monkeypatch.setattr("keeptune.experiments.single_run.start", lambda _: {}["no such key"])
    before = list(logging.getLogger("keeptune").handlers)
    with pytest.raises(KeyError):
        run_all(comparison, specs)
    assert logging.getLogger("keeptune").handlers == before


def test_dry_run_lists_the_points_and_writes_nothing(
    write_sweep: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, other = write_sweep(sweep=POINTS, seeds=[0, 1]), tmp_path / "other"
    said = keeptune("sweep", recipe, "--dry-run", "--output", other, capsys=capsys)
    assert said.code == 0
    assert "method.rank: 2" in said.out
    assert f"4 runs below {other / 'runs'}" in said.out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recipe.yaml"]


def test_points_set_sections_before_parts_and_do_not_leak(write_sweep: Write) -> None:
    points = [
        {"name": "b", "train.weight_decay": 0.1},
        {"name": "a", "method.rank": 2, "method": "lora-null", "targets": ["q_proj"]},
    ]
    loaded = load_sweep(write_sweep(sweep=points, seeds=[4]))
    b, a = (spec.recipe for spec in list_runs(loaded))
    assert a.method == {"name": "lora-null", "rank": 2}
    assert b.method["name"] == "lora"
    assert (a.targets, b.targets) == (["q_proj"], None)
    assert a.train["seed"] == b.train["seed"] == 4
    assert ("weight_decay" in a.train, b.train["weight_decay"]) == (False, 0.1)
    assert a.output != b.output
    assert a.store == b.store


def test_seeds_are_the_recipes_own_unless_told(write_sweep: Write) -> None:
    assert load_sweep(write_sweep(sweep=POINTS)).section.seeds == [0]
    assert load_sweep(write_sweep(sweep=POINTS), {"train.seed": 5}).section.seeds == [5]
    assert load_sweep(write_sweep(sweep=POINTS), {"seeds": [2, 1]}).section.seeds == [2, 1]


@pytest.mark.parametrize(
    ("points", "kind", "marks"),
    [
        (None, RecipeError, ["key sweep", "got nothing"]),
        ([], RecipeError, ["key sweep", "an empty list"]),
        ({"name": "a"}, RecipeError, ["key sweep"]),
        (["a"], RecipeError, ["key sweep"]),
        ([{"method.rank": 2}], RecipeError, ["point 1", "no name"]),
        ([POINTS[0], {"name": 3}], RecipeError, ["point 2", "got 3"]),
        *(([{"name": name}], RecipeError, ["point 1", repr(name)]) for name in ("", "..", "/", "x" * 81)),
        ([POINTS[0], POINTS[0]], RecipeError, ['two entries called "rank 2" and "rank 2"']),
        ([{"name": "a"}, {"name": "A"}], RecipeError, ['"a" and "A"']),
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
    ],
)
def test_wrong_sweeps_are_refused_before_the_first_run(
    write_sweep: Write, tmp_path: Path, points: Any, kind: type[KeeptuneError], marks: list[str]
) -> None:
    recipe = write_sweep(sweep=[])
    values = json.loads(recipe.read_text(encoding="utf-8"))
    with pytest.MonkeyPatch.context() as patch:  # JSON cannot hold a key that is no text, YAML can
        patch.setattr("keeptune.experiments.plan_runs.read_values", lambda *_: values | {"sweep": points})
        with pytest.raises(kind) as raised:
            comparison = load_sweep(recipe)
            check_runs(comparison, list_runs(comparison))
    for mark in marks:
        assert mark in str(raised.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("seeds", [[], 3, [0, 0], [-1], ["0"], [True], [1.0]])
def test_wrong_seeds(write_sweep: Write, seeds: Any) -> None:
    with pytest.raises(RecipeError, match="key seeds"):
        load_sweep(write_sweep(sweep=POINTS, seeds=seeds))


def test_a_sweep_is_no_recipe_of_one_run(write_sweep: Write, capsys: pytest.CaptureFixture[str]) -> None:
    said = keeptune("plan", write_sweep(sweep=POINTS), capsys=capsys)
    assert said.code == 2
    assert "keeptune sweep" in said.err
