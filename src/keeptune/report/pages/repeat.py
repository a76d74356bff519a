"""What is needed to repeat a run: its commands, its recipe, and the versions of what it ran on."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import yaml

__all__ = ["recipe_text", "repeat", "versions"]

_PACKAGES: Final = ("keeptune", "torch", "transformers", "peft", "trl")


def repeat(commands: Sequence[tuple[str, str]], recipes: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Returns what a page says about how to repeat a run.

    Args:
        commands: Pairs of what a command does and the command.
        recipes: Pairs of a name and a recipe: its mapping, or its text as YAML.

    Returns:
        ``commands``, ``recipes`` (each ``name`` and ``text``) and ``versions``.
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


def versions() -> dict[str, str]:
    """Returns the versions of Python, of installed packages, of the platform, and keeptune's commit in a repository."""
    known = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            known[name] = version(name)
        except PackageNotFoundError:
            continue
    commit = _commit(Path(__file__).parent)
    return known | ({"git commit": commit} if commit else {}) | {"platform": platform.platform()}


def _commit(folder: Path) -> str:
    """Returns the commit of the repository that tracks a folder, not of one that only surrounds it."""
    try:
        _git(folder, "ls-files", "--error-unmatch", "__init__.py")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", "../..")
        return _git(folder, "rev-parse", "HEAD") + (" (with changes)" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return ""


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()
