"""The grid of a sweep: the product of its axes as points, named after their values, and the baseline beside them.

sweep:
  grid: {method.strength: [0.1, 1, 10], method.batches: [1, 2, 3]}
  baseline: {method: {name: lora, rank: 8}}     # settings, or the name of one of `points`
  points: [{name: full, method: full}]          # more points outside the grid
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from keeptune.core.artefact import canonical_json
from keeptune.core.errors import RecipeError, nearest

__all__ = ["read_section", "spelt"]

_KEYS = ("grid", "points", "baseline")
_EXAMPLE = "Example: sweep: {grid: {method.strength: [0.1, 1], method.rank: [4, 8]}, baseline: {method: lora}}."


def read_section(section: Any, where: str) -> tuple[Any, dict[str, Any]]:
    """Read the ``sweep`` section of a recipe: a list of points, or a mapping with a grid, points and a baseline.

    Args:
        section: The section; a list is given back as it is.
        where: For error messages.

    Returns:
        The points as mappings, and what the record says about them: ``baseline``, the name of a point, and ``grid``
        with ``axes`` (each a ``key`` and its ``values``) and ``cells`` (name of a point to the place of its value on
        each axis).

    Raises:
        RecipeError: A key is unknown, an axis is no list of different values, or there is no such baseline.
    """
    if not isinstance(section, Mapping):
        return section, {}
    for key in section:
        if key not in _KEYS:
            raise RecipeError(
                f"{where}, key sweep.{key}",
                got="an unknown key",
                wanted="a list of points, or the keys grid, points and baseline",
                next_step=nearest(str(key), _KEYS),
            )
    listed = section.get("points", [])
    if not isinstance(listed, list):
        raise RecipeError(
            f"{where}, key sweep.points",
            got=repr(listed),
            wanted="a list of points, each a name and dotted keys of the recipe",
            next_step="Example: points: [{name: full, method: full}].",
        )
    about: dict[str, Any] = {}
    points: list[Any] = []
    if "grid" in section:
        axes = _axes(section["grid"], f"{where}, key sweep.grid")
        points = _cells(axes, f"{where}, key sweep.grid")
        about["grid"] = {
            "axes": [{"key": key, "values": values} for key, values in axes.items()],  # JSON would sort a mapping
            "cells": {point["name"]: places for point, places in zip(points, _places(axes), strict=True)},
        }
    points += listed
    baseline = _baseline(section.get("baseline"), points, f"{where}, key sweep.baseline")
    if baseline is not None:
        about["baseline"] = baseline["name"]
        points += [] if baseline in points else [baseline]
    return points, about


def _axes(grid: Any, where: str) -> dict[str, list[Any]]:
    if not isinstance(grid, Mapping) or not grid:
        raise RecipeError(where, got=repr(grid), wanted="a list of values for each dotted key", next_step=_EXAMPLE)
    axes: dict[str, list[Any]] = {}
    for key, values in grid.items():
        if not isinstance(values, list) or not values or len({canonical_json(v) for v in values}) < len(values):
            raise RecipeError(
                f"{where}.{key}", got=repr(values), wanted="a list of different values", next_step=_EXAMPLE
            )
        axes[str(key)] = values
    return axes


def _places(axes: Mapping[str, Sequence[Any]]) -> list[list[int]]:
    return [list(places) for places in itertools.product(*(range(len(values)) for values in axes.values()))]


def _cells(axes: Mapping[str, Sequence[Any]], where: str) -> list[dict[str, Any]]:
    """Make a point for each cell; a grid of one axis of numbers gives them an x."""
    words = _words(list(axes))
    numeric = len(axes) == 1 and all(map(_is_number, next(iter(axes.values()))))
    cells: dict[str, dict[str, Any]] = {}
    for values in itertools.product(*axes.values()):
        settings = dict(zip(axes, values, strict=True))
        name = ", ".join(f"{words[key]} {spelt(value)}" for key, value in settings.items())
        if name.casefold() in cells:
            raise RecipeError(
                where,
                got=f'two cells whose name would be "{name}"',
                wanted="values that names of folders tell apart",
                next_step="List these points under `points`, each with a name.",
            )
        cells[name.casefold()] = {"name": name, **({"x": values[0]} if numeric else {}), **settings}
    return list(cells.values())


def _words(keys: Sequence[str]) -> dict[str, str]:
    """Name each axis by the last part of its key, or by all of it where two end alike."""
    last = [key.rpartition(".")[2] for key in keys]
    return {key: word if last.count(word) == 1 else key for key, word in zip(keys, last, strict=True)}


def spelt(value: Any) -> str:
    """Write a value of a recipe with the signs that names of points may have.

    Args:
        value: As a YAML file holds it.

    Returns:
        The text.

    >>> spelt(0.001), spelt([0, 1]), spelt({"name": "lora", "rank": 8}), spelt(None)
    ('0.001', '0,1', 'name lora rank 8', 'none')
    >>> spelt([{"name": "mica", "rank": 8, "targets": ["down_proj"]}, {"name": "lora", "targets": ["up_proj"]}])
    'mica+lora'
    """
    if value is None:
        return "none"
    if isinstance(value, list) and value and all(isinstance(part, Mapping) and "targets" in part for part in value):
        return "+".join(spelt(part.get("name")) for part in value)  # methods side by side: all their options are long
    if isinstance(value, Mapping):
        return " ".join(f"{key} {spelt(part)}" for key, part in value.items())
    if isinstance(value, list | tuple):
        return ",".join(map(spelt, value))
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return re.sub(r"[^\w .,=+-]", "_", text)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _baseline(given: Any, points: Sequence[Any], where: str) -> dict[str, Any] | None:
    """Find the point that a name stands for, or make one of settings."""
    if given is None:
        return None
    names = [str(point.get("name")) for point in points if isinstance(point, dict)]
    if isinstance(given, Mapping):
        return {"name": "baseline", **given}
    for point in points:
        if isinstance(point, dict) and point.get("name") == given:
            return point
    raise RecipeError(
        where,
        got=f"{given!r}, which is no point of this sweep",
        wanted="the name of a point, or dotted keys of the recipe",
        next_step=nearest(str(given), names) if names else "Example: baseline: {method: lora}.",
    )
