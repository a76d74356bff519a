"""Finished runs that the tests of a comparison share; they are copied before anything is written to them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.pipeline.conftest import data, store
from tests.pipeline.support import METHODS, recipe_of, values, write_recipe

from keeptune.experiments.plan_runs import Comparison, load_comparison
from keeptune.pipeline.job import Job
from keeptune.pipeline.run import run

__all__ = ["data", "store"]  # fixtures of the pipeline's tests


@pytest.fixture
def write_sweep(data: Path, store: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write an ordinary recipe of two steps and one short benchmark per role, with what is given beside it."""

    def to_file(**changes: Any) -> Path:
        given = values(data, tmp_path / "out", store, **changes)
        given["train"] = {"max_steps": 2, "learning_rate": 0.05, "per_device_train_batch_size": 4}
        given["evaluate"] = given["evaluate"][:2]
        return write_recipe(tmp_path / "recipe.yaml", given)

    return to_file


@pytest.fixture
def load(data: Path, store: Path, tmp_path: Path) -> Callable[..., Comparison]:
    """Load a comparison of runs of two steps; keys of the section by name."""

    def make(*methods: Any, **section: Any) -> Comparison:
        given = values(data, tmp_path / "out", store)
        del given["method"], given["train"]["seed"]
        given["evaluate"] = given["evaluate"][:2]
        given["train"] |= {"max_steps": 2, "save_strategy": "no"}
        given["compare"] = {"methods": list(methods), "seeds": [0], "baselines": False, **section}
        return load_comparison(write_recipe(tmp_path / "compare.yaml", given))

    return make


@pytest.fixture(scope="session")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[dict[str, Any], Path]]:
    """Give the recipe's values and the folder of a finished run of a method."""
    folder = tmp_path_factory.mktemp("trained")
    done: dict[str, dict[str, Any]] = {}

    def output(name: str) -> tuple[dict[str, Any], Path]:
        if name not in done:
            given = values(data, folder / name, folder / "store", method=METHODS[name])
            given["evaluate"] = given["evaluate"][:2]
            given["train"]["max_steps"] = 3
            run(recipe_of(given))
            done[name] = given
        return done[name], folder / name

    return output


@pytest.fixture
def job(trained: Callable[[str], tuple[dict[str, Any], Path]], tmp_path: Path) -> Callable[[str], Job]:
    """Copy a finished run to this test's folder and give its job."""

    def make(name: str) -> Job:
        given, folder = trained(name)
        copy = tmp_path / "runs" / f"{name}-seed0"
        shutil.copytree(folder, copy)
        return Job(recipe_of({**given, "output": str(copy)}))

    return make
