"""What a page says about how to repeat it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import torch
import yaml

from keeptune.report.pages import repeat as module
from keeptune.report.pages.repeat import recipe_text, repeat, versions


def test_recipes_are_yaml_and_texts_stay(tmp_path: Path) -> None:
    recipe = {"model": "m", "train": {"learning_rate": 1e-3}, "name": "é\u2028<"}
    assert yaml.safe_load(recipe_text(recipe)) == recipe
    assert list(yaml.safe_load(recipe_text(recipe))) == ["model", "train", "name"]
    assert recipe_text("model: m # mine") == "model: m # mine\n"


def test_versions_are_those_installed() -> None:
    found = versions()
    assert found["torch"] == torch.__version__
    assert {"python", "transformers", "peft", "trl", "keeptune", "platform"} <= set(found)
    given = repeat([("Run", "keeptune run r.yaml")], [("Recipe", {"model": "m"})])
    assert given["commands"] == [{"words": "Run", "line": "keeptune run r.yaml"}]
    assert given["recipes"] == [{"name": "Recipe", "text": "model: m\n"}]


def test_a_commit_is_told_only_where_the_code_is_tracked(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        flags = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", *flags, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    package = tmp_path / "src" / "report"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    assert module._commit(package) == ""
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "x")
    assert module._commit(package) == "", "an environment inside someone's repository"
    git("add", ".")
    git("commit", "-q", "-m", "y")
    assert module._commit(package) == git("rev-parse", "HEAD").strip()
    (package / "__init__.py").write_text("1")
    assert module._commit(package).endswith(" (with changes)")
