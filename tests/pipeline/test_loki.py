"""LoKI from a recipe to a report, and its change cut to a smaller rank."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.models import copies
from tests.pipeline.support import keeptune, recipe_of, write_recipe

from keeptune.core.artefact import read_json
from keeptune.core.errors import RecipeError
from keeptune.core.plan import Plan
from keeptune.model.pretrained import load_model
from keeptune.pipeline.run import run

Values = Callable[..., dict[str, Any]]
METHODS: dict[str, dict[str, Any]] = {
    "rows": {"name": "loki", "q": 10},
    "within": {"name": "loki", "q": 30, "rank": 4},
    "other attribution": {"name": "loki", "q": 10, "attribution": {"positions": "all", "steps": 2, "examples": 3}},
}


@pytest.mark.parametrize("kind", METHODS)
def test_a_run_trains_rows_of_the_down_projections_and_reports_what_it_trained(
    kind: str, recipe_values: Values
) -> None:
    given = recipe_values(method=METHODS[kind], export={"format": "merged"})
    report = run(recipe_of(given))
    folder = Path(given["output"])
    plan = Plan.load(folder / "plan")
    assert {t.target.role for t in plan.targets} == {"down_proj"}
    (entry,) = report["methods"]
    rows = {"rows": 6, "within": 19}.get(kind, 6)  # of 64
    counts = {t.trained_parameters for t in plan.targets}
    n = plan.targets[0].target.in_features
    assert counts == {4 * (rows + n) if kind == "within" else rows * n}
    assert entry["trained_parameters"] == 5 * counts.pop()
    before, after = copies(load_model(given["model"])), copies(load_model(str(folder / "merged")))
    for name, value in before.items():
        target = next((t for t in plan.targets if name == f"{t.target.name}.weight"), None)
        moved = [] if target is None else list(target.decision.rows or ())
        assert (after[name] != value).flatten(1 if value.ndim > 1 else 0).any(-1).nonzero().flatten().tolist() == moved


def test_an_export_of_a_smaller_rank_says_what_it_leaves_out(
    recipe_values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = recipe_values(method=METHODS["rows"])
    run(recipe_of(given))
    recipe, folder = write_recipe(tmp_path / "recipe.yaml", given), Path(given["output"])
    whole = read_json(folder / "adapter" / "keeptune.json")["export"]
    assert (whole["rank"], whole["error"]) == (8, 0)
    said = keeptune("export", recipe, "--export.rank", 1, capsys=capsys)
    assert said.code == 0
    cut = read_json(folder / "adapter" / "keeptune.json")["export"]
    assert (cut["rank"], 0 < cut["error"] < 1) == (1, True)
    assert f"{cut['error']:.2%} of the trained change (Frobenius) is left out" in said.out
    assert keeptune("export", recipe, "--export.rank", 1, capsys=capsys).out == said.out  # taken from the folder
    said = keeptune("export", recipe, "--export.rank", 1, "--export.format", "merged", capsys=capsys)
    assert said.code == 2
    assert "a merged model has no rank" in said.err


@pytest.mark.parametrize(
    ("method", "told"),
    [
        ({"name": "loki", "attribution": {"position": "all"}}, r"attribution\.position"),
        ({"name": "loki", "attribution": {"rule": "middle"}}, r"attribution\.rule"),
        ({"name": "loki", "selection": "lowest"}, r"selection"),
        ({"name": "loki", "q": "many"}, r"method.q"),
    ],
)
def test_wrong_options_are_refused_with_their_key(method: dict[str, Any], told: str, recipe_values: Values) -> None:
    with pytest.raises(RecipeError, match=told):
        recipe_of(recipe_values(method=method))


def test_the_report_tells_the_options(recipe_values: Values) -> None:
    given = recipe_values(method=METHODS["other attribution"])
    run(recipe_of(given))
    report = (Path(given["output"]) / "report.html").read_text(encoding="utf-8")
    assert "layer-balanced" in report
    assert json.loads((Path(given["output"]) / "report.json").read_text())["methods"][0]["name"] == "loki"
