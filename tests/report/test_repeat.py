"""What a page says about how to repeat it."""

from __future__ import annotations

import yaml

from keeptune.core.versions import versions
from keeptune.report.pages.page import recipe_text, repeat


def test_recipes_are_yaml_and_texts_stay() -> None:
    recipe = {"model": "m", "train": {"learning_rate": 1e-3}, "name": "é\u2028<"}
    assert yaml.safe_load(recipe_text(recipe)) == recipe
    assert list(yaml.safe_load(recipe_text(recipe))) == ["model", "train", "name"]
    assert recipe_text("model: m # mine") == "model: m # mine\n"


def test_commands_recipes_and_versions_are_put_together() -> None:
    given = repeat([("Run", "keeptune run r.yaml")], [("Recipe", {"model": "m"})])
    assert given["commands"] == [("Run", "keeptune run r.yaml")]
    assert given["recipes"] == [("Recipe", "model: m\n")]
    assert given["versions"] == versions()
