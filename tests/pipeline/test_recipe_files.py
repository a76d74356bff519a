"""Every file in recipes/ is a recipe that could run as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from keeptune.experiments.plan_runs import check_runs, list_runs, load_comparison, load_sweep
from keeptune.experiments.sequence.stages_section import load_sequence
from keeptune.pipeline.job import Job
from keeptune.recipe.schema import load_recipe

ROOT = Path(__file__).parents[2]
# Published tables name models and data on the hub: dry_run/test_published.py and test_peft_comparison.py read these.
FILES = [path for path in sorted((ROOT / "recipes").glob("*.yaml")) if "hf://" not in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_could_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if "compare" in yaml.safe_load(path.read_text(encoding="utf-8")):
        runs = list_runs(load_comparison(path))
        for label in {run.label for run in runs}:
            Job(next(run.recipe for run in runs if run.label == label)).check_needs()
        Job(runs[0].recipe).check()
        return
    if "stages" in yaml.safe_load(path.read_text(encoding="utf-8")):
        for stage in load_sequence(path).stages:
            Job(stage.recipe).check()
        return
    if "sweep" not in yaml.safe_load(path.read_text(encoding="utf-8")):
        Job(load_recipe(path)).check()
        return
    sweep = load_sweep(path)
    assert sweep.output.name == path.stem
    check_runs(sweep, list_runs(sweep))
    assert "full" in [entry.label for entry in sweep.entries], "without it there is no T"
    settings = [sorted(entry.settings.items()) for entry in sweep.entries]
    assert all(settings.count(one) == 1 for one in settings)


def test_there_are_recipes() -> None:
    assert len(FILES) >= 2
