"""What is needed to repeat a run: its commands, its recipe, and the versions of what it ran on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from keeptune.core.versions import versions


def repeat(commands: Sequence[tuple[str, str]], recipes: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Returns ``commands``, ``recipes`` (``name`` and ``text`` each) and ``versions``: how to repeat a run.

    Commands come with what they do, recipes as mappings or as YAML.
    """
    return {
        "commands": [{"words": words, "line": line} for words, line in commands],
        "recipes": [{"name": name, "text": recipe_text(recipe)} for name, recipe in recipes],
        "versions": versions(),
    }


def recipe_text(recipe: Mapping[str, Any] | str) -> str:
    """Returns a recipe as YAML that ends with a line feed; a text is taken as it is."""
    if isinstance(recipe, str):
        return recipe if recipe.endswith("\n") else f"{recipe}\n"
    return yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True, width=100)
