"""Data, a store and finished runs that the tests of the job share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.pipeline.support import METHODS, recipe_of, values, write_data

from keeptune.pipeline.run import run


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def recipe_values(data: Path, store: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Returns the values of a recipe whose output is in this test's folder."""

    def make(**changes: Any) -> dict[str, Any]:
        output, own = changes.pop("output", tmp_path / "out"), changes.pop("store", store)
        return values(data, output, own, **changes)

    return make


@pytest.fixture(scope="session")
def finished(data: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns the folder of a finished run of a method; it may only be read."""
    folder = tmp_path_factory.mktemp("finished")
    done: set[str] = set()

    def output(name: str) -> Path:
        if name not in done:
            run(recipe_of(values(data, folder / name, store, method=METHODS[name])))
            done.add(name)
        return folder / name

    return output
