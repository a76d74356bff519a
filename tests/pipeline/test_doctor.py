"""doctor: what is there, what is missing for a recipe, and what mends it."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from importlib import metadata
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from tests.pipeline.support import keeptune, write_recipe

from keeptune.cli.first_steps import examine

Values = Callable[..., dict[str, Any]]


def test_a_machine_without_a_recipe_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    said = keeptune("doctor", "--json", capsys=capsys)
    found = {one["what"]: one for one in json.loads(said.out)["findings"]}
    assert (found["python"]["found"], found["torch"]["found"]) == (platform.python_version(), version("torch"))
    assert "cores" in found["cpu"]["found"]
    assert found["keeptune[benchmarks]"]["missing"] is False


def test_a_recipe_that_can_run_lacks_nothing(
    recipe_values: Values, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = keeptune("doctor", write_recipe(tmp_path / "recipe.yaml", recipe_values()), capsys=capsys)
    assert said.code == 0, said.out
    assert said.out.rstrip().endswith("missing: nothing")
    assert "at its peak" in said.out and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "what", "mend"),
    [
        ({"model": "meta-llama/Llama-3.3-70B-Instruct", "dtype": "float32"}, "memory", "quantization"),
        ({"task": {"train": "gone.jsonl", "prompt": "{question}", "completion": "{answer}"}}, "gone.jsonl", ""),
        ({"model": "nobody/has-this"}, "nobody/has-this", ""),
        ({"train": {"learning_rat": 1}}, "learning_rat", "learning_rate"),
    ],
)
def test_what_is_missing_is_named_with_what_mends_it(
    changes: dict[str, Any],
    what: str,
    mend: str,
    recipe_values: Values,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", recipe_values(evaluate=[], **changes))
    said = keeptune("doctor", recipe, "--json", capsys=capsys)
    assert said.code == 1, said.err
    (one,) = (one for one in json.loads(said.out)["findings"] if one["missing"])
    assert what in one["what"] + one["found"]
    assert mend in one["mend"] and one["mend"]


def test_packages_are_missing_where_they_are_needed(
    recipe_values: Values, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs = ["torch>=99", "numpy>=1", "bitsandbytes>=99; extra == 'quantised'", "gone-from-here; extra == 'compare'"]
    monkeypatch.setattr(metadata, "requires", lambda name: needs)

    def missing(**changes: Any) -> list[tuple[str, str]]:
        recipe = write_recipe(tmp_path / "recipe.yaml", recipe_values(**changes))
        return [(one.what, one.mend) for one in examine(recipe) if one.missing]

    core = ("torch>=99", "pip install 'torch>=99'")
    assert missing() == [core]
    quantised = ("keeptune[quantised]", "pip install 'keeptune[quantised]'")
    assert missing(quantization={"load_in_8bit": True})[:2] == [core, quantised]
    names = {one.what: one.found for one in examine()}
    assert names["keeptune[compare]"] == "without gone-from-here"
