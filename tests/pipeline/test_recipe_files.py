"""Every file in recipes/ is a recipe that could run as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from keeptune.experiments.comparison.cells import grid, load_comparison
from keeptune.experiments.sequence.schema import load_sequence
from keeptune.experiments.sweep import load_sweep
from keeptune.pipeline.job import Job
from keeptune.recipe.schema import load_recipe

ROOT = Path(__file__).parents[2]
# The papers' tables name models and data on the hub: dry_run/test_published.py checks them without fetching.
FILES = [path for path in sorted((ROOT / "recipes").glob("*.yaml")) if "-table" not in path.stem]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_could_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if "compare" in yaml.safe_load(path.read_text(encoding="utf-8")):
        cells = grid(load_comparison(path))
        for label in {cell.label for cell in cells}:
            Job(next(cell.recipe for cell in cells if cell.label == label)).check_needs()
        Job(cells[0].recipe).check()
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
    assert "full" in [point.name for point in sweep.points], "without it there is no T"
    settings = [sorted(point.settings.items()) for point in sweep.points]
    assert all(settings.count(one) == 1 for one in settings)


def test_there_are_recipes() -> None:
    assert len(FILES) >= 2
