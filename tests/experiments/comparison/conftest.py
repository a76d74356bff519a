"""Finished runs that the tests of a comparison share; they are copied before anything is written to them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.pipeline.support import METHODS, recipe_of, values, write_data

from keeptune.pipeline.job import Job
from keeptune.pipeline.run import run


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[dict[str, Any], Path]]:
    """Give the recipe's values and the folder of a finished run of a method."""
    folder = tmp_path_factory.mktemp("trained")
    data = write_data(folder / "data")
    done: dict[str, dict[str, Any]] = {}

    def output(name: str) -> tuple[dict[str, Any], Path]:
        if name not in done:
            given = values(data, folder / name, folder / "store", method=METHODS[name])
            given["evaluate"] = given["evaluate"][:2]
            run(recipe_of(given))
            done[name] = given
        return done[name], folder / name

    return output


@pytest.fixture
def job(trained: Callable[[str], tuple[dict[str, Any], Path]], tmp_path: Path) -> Callable[[str], Job]:
    """Copy a finished run to this test's folder and give its job."""

    def make(name: str) -> Job:
        given, folder = trained(name)
        copy = tmp_path / "cells" / f"{name}-seed0"
        shutil.copytree(folder, copy)
        return Job(recipe_of({**given, "output": str(copy)}))

    return make
