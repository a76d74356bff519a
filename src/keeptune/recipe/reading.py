"""The values of a recipe before they are checked: from the YAML file and from the command line."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from keeptune.core.errors import RecipeError
from keeptune.recipe.yaml_values import parse_yaml

DEFAULT_METHOD = "keep"  # why: docs/guides/keep.md


def read_values(path: Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Reads the values of a recipe without checking them.

    Args:
        path: The YAML file.
        overrides: Dotted key to value; a whole section is set before its parts, in whatever order they come.

    Raises:
        RecipeError: The file is missing or not YAML, or an override leads nowhere.
    """
    where = f"recipe {path}"
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(where, got=str(error), wanted="a YAML file", next_step="Check the path.") from error
    except yaml.YAMLError as error:
        got = " ".join(str(error).split())
        raise RecipeError(where, got=got, wanted="YAML", next_step="Correct the line named above.") from error
    if not isinstance(values, dict):
        got = f"a {type(values).__name__}"
        raise RecipeError(where, got=got, wanted="keys and values", next_step="Start with `model: path`.")
    for key, value in sorted((overrides or {}).items(), key=lambda item: item[0].count(".")):
        set_value(values, key, value, where=f"command line --{key}")
    return values


def set_value(values: dict[str, Any], key: str, value: Any, *, where: str) -> None:
    """Sets one key of a recipe's values, in place.

    Args:
        values: As a YAML file holds them.
        key: Dotted, such as ``train.learning_rate``.
        value: A YAML value.
        where: For error messages.

    Raises:
        RecipeError: The key leads through something that has no such part.
    """
    *path, last = key.split(".")
    place: Any = values
    if path and ("method" in values or path[0] == "method"):
        values["method"] = spelt_out(values.get("method", DEFAULT_METHOD))
    if len(path) > 1 and isinstance(values.get("evaluate"), list):
        values["evaluate"] = [spelt_out(entry) for entry in values["evaluate"]]
    try:
        for part in path:
            if isinstance(place, dict) and place.get(part) is None:
                place[part] = {}
            place = place[int(part)] if isinstance(place, list) else place[part]
        place[int(last) if isinstance(place, list) else last] = value
    except (IndexError, ValueError, TypeError, KeyError) as error:
        raise RecipeError(
            where,
            got="a path through something that has no such part",
            wanted="a key of the recipe, dots between levels and numbers for list entries",
            next_step="Example: evaluate.0.examples",
        ) from error


def parse_pairs(words: Sequence[str], switches: Collection[str]) -> dict[str, Any]:
    """Reads ``--key value`` pairs from the command line; values are YAML, and dashes may stand for underscores.

    Args:
        words: ``["--train.learning_rate", "1e-3", "--targets", "[q_proj]"]`` or ``--key=value``.
        switches: Keys that may stand alone.

    Raises:
        RecipeError: A word is not a key, or a key has no value.
    """
    pairs: dict[str, Any] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        key, equals, text = word.removeprefix("--").partition("=")
        key = key.replace("-", "_")
        if word.startswith("--") and key in switches and not equals and (not rest or rest[0].startswith("--")):
            pairs[key] = True
            continue
        if not word.startswith("--") or not key or not (equals or rest):
            raise RecipeError(
                "command line",
                got=word,
                wanted="--key value, after the recipe",
                next_step="Example: keeptune run recipe.yaml --train.learning_rate 1e-3",
            )
        try:
            pairs[key] = _parse_value(text if equals else rest.pop(0))
        except yaml.YAMLError as error:
            raise RecipeError(
                f"command line --{key}", got=" ".join(str(error).split()), wanted="a YAML value", next_step="Quote it."
            ) from error
    return pairs


def _parse_value(text: str) -> Any:
    value = parse_yaml(text)
    # To YAML, the template {answer} is a mapping without values.
    template = isinstance(value, dict) and value and all(part is None for part in value.values())
    return text if template else value


def spelt_out(section: Any) -> Any:
    """Returns ``{name: farss}`` for the short form ``farss`` of a method, a penalty or a benchmark; others as is."""
    return {"name": section} if isinstance(section, str) else section
