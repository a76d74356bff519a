"""The values of a recipe before they are checked: reading the YAML file, and setting single keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from keeptune.core.errors import RecipeError

__all__ = ["override_value", "parse_yaml", "read_values", "set_value", "spelt_out"]


class _Loader(yaml.SafeLoader):
    """YAML where 1e-4 is a number, as YAML 1.2 and everybody's expectation have it."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str) -> Any:
    """Read YAML where 1e-4 is a number.

    Args:
        text: The YAML.

    Returns:
        The value.
    """
    return yaml.load(text, Loader=_Loader)


def read_values(path: Path, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Read the values of a recipe without checking them.

    Args:
        path: The YAML file.
        overrides: Dotted key to value; a whole section is set before its parts, in whatever order they come.

    Returns:
        Key to value, as the file holds them.

    Raises:
        RecipeError: The file is missing or not YAML, or an override leads nowhere.
    """
    try:
        values = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"recipe {path}", got=str(error), wanted="a YAML file", next_step="Check the path."
        ) from error
    except yaml.YAMLError as error:
        raise RecipeError(
            f"recipe {path}", got=" ".join(str(error).split()), wanted="YAML", next_step="Mend the line named above."
        ) from error
    if not isinstance(values, dict):
        raise RecipeError(
            f"recipe {path}",
            got=f"a {type(values).__name__}",
            wanted="keys and values",
            next_step="Start with `model: path`.",
        )
    for key, value in sorted((overrides or {}).items(), key=lambda item: item[0].count(".")):
        set_value(values, key, value, where=f"command line --{key}")
    return values


def set_value(values: dict[str, Any], key: str, value: Any, *, where: str) -> None:
    """Set one key of a recipe's values, in place.

    Args:
        values: As a YAML file holds them.
        key: Dotted, such as ``train.learning_rate``.
        value: The new value.
        where: For error messages.

    Raises:
        RecipeError: The key leads through something that has no such part.
    """
    *path, last = key.split(".")
    place: Any = values
    if path and "method" in values:
        values["method"] = spelt_out(values["method"])
    if len(path) > 1 and isinstance(values.get("evaluate"), list):
        values["evaluate"] = [spelt_out(entry) for entry in values["evaluate"]]
    try:
        for part in path:
            if isinstance(place, dict) and place.get(part) is None:
                place[part] = {}
            place = place[int(part)] if isinstance(place, list) else place[part]
        if isinstance(place, list):
            place[int(last)] = value
        else:
            place[last] = value
    except (IndexError, ValueError, TypeError, KeyError) as error:
        raise RecipeError(
            where,
            got="a path through something that has no such part",
            wanted="a key of the recipe, dots between levels and numbers for list entries",
            next_step="Example: evaluate.0.examples",
        ) from error


def override_value(text: str) -> Any:
    """Read a value from the command line.

    Args:
        text: YAML, or a template such as ``{answer}``.

    Returns:
        The value.
    """
    value = parse_yaml(text)
    # To YAML, the template {answer} is a mapping without values.
    template = isinstance(value, dict) and value and all(part is None for part in value.values())
    return text if template else value


def spelt_out(method: Any) -> Any:
    """Read the short form ``method: farss`` as ``method: {name: farss}``; the same for a benchmark.

    Args:
        method: The section, or a name in its place.

    Returns:
        The section; what is no name is left as it is.
    """
    return {"name": method} if isinstance(method, str) else method
