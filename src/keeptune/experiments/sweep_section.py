"""The ``sweep:`` section of a recipe: points, or a grid of values, each an entry of a comparison.

sweep:
  grid: {method.strength: [0.1, 1, 10], method.batches: [1, 2, 3]}
  baseline: {method: {name: lora, rank: 8}}     # settings, or the name of one of `points`
  points: [{name: full, method: full}]          # more points outside the grid
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from keeptune.core.artefact import canonical_json
from keeptune.core.errors import RecipeError, nearest
from keeptune.experiments.entries import Entry, as_text, check_label, check_labels, check_settings

__all__ = ["axis_of", "point_entries", "read_seeds", "read_sweep"]

_KEYS = ("grid", "points", "baseline")
_GRID = "Example: sweep: {grid: {method.strength: [0.1, 1], method.rank: [4, 8]}, baseline: {method: lora}}."
_POINTS = 'sweep: [{name: "rank 4", method.rank: 4}, {name: "rank 8", method.rank: 8}]'


def read_sweep(section: Any, where: str) -> tuple[Any, dict[str, Any]]:
    """Reads the section: a list of points, which is returned as it is, or a mapping with a grid, points and a baseline.

    Returns:
        The points as mappings, and what the record says about them: ``baseline``, the name of a point, and ``grid``
        with ``axes`` (each a ``key`` and its ``values``) and ``cells`` (name of a point to the index of its value on
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
        raise _no_points(listed, f"{where}, key sweep.points")
    about: dict[str, Any] = {}
    points: list[Any] = []
    if "grid" in section:
        axes = _axes(section["grid"], f"{where}, key sweep.grid")
        points, places = _grid_points(axes)
        about["grid"] = {
            "axes": [{"key": key, "values": values} for key, values in axes.items()],  # JSON would sort a mapping
            "cells": {point["name"]: place for point, place in zip(points, places, strict=True)},
        }
    points += listed
    baseline = _baseline(section.get("baseline"), points, f"{where}, key sweep.baseline")
    if baseline is not None:
        about["baseline"] = baseline["name"]
        points += [] if baseline in points else [baseline]
    return points, about


def point_entries(points: Any, where: str) -> tuple[Entry, ...]:
    """Reads points (``name``, perhaps ``x``, and the dotted keys that each changes) as entries of a comparison."""
    if not isinstance(points, list) or not points or not all(isinstance(point, dict) for point in points):
        raise _no_points(points, f"{where}, key sweep")
    entries = []
    for number, point in enumerate(points, start=1):
        name = check_label(point.get("name"), f"{where}, sweep point {number}", _POINTS)
        place, x = f"{where}, sweep point {name}", point.get("x")
        if x is not None and (isinstance(x, bool) or not isinstance(x, int | float) or not math.isfinite(x)):
            raise RecipeError(
                place, got=f"x: {x!r}", wanted="a number: the point's place on the axis", next_step="Correct it."
            )
        settings = {key: value for key, value in point.items() if key not in ("name", "x")}
        check_settings(settings, place)
        entries.append(Entry(name, settings, x=None if x is None else float(x)))
    check_labels(entries, f"{where}, key sweep", "Rename one of them, or list the points of a grid under `points`.")
    return tuple(entries)


def read_seeds(values: dict[str, Any], where: str) -> list[int]:
    """Takes ``seeds`` out of a recipe's values: its own seed where none are listed; RecipeError for no list of them."""
    train = values.get("train")
    seeds: list[Any] | None = values.pop("seeds", None)
    if seeds is None:
        return [train.get("seed", 0) if isinstance(train, dict) else 0]
    right = isinstance(seeds, list) and all(isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in seeds)
    if not right or not seeds or len(set(seeds)) < len(seeds):
        raise RecipeError(
            f"{where}, key seeds",
            got=repr(seeds),
            wanted="a list of different whole numbers from 0",
            next_step="Example: seeds: [0, 1, 2].",
        )
    return seeds


def axis_of(entries: Sequence[Entry]) -> str | None:
    """Returns the key whose values are the entries' x, if there is one."""
    with_x = [entry for entry in entries if entry.x is not None]
    keys = [key for key in with_x[0].settings if all(e.settings.get(key) == e.x for e in with_x)] if with_x else []
    return keys[0] if keys else None


def _no_points(given: Any, where: str) -> RecipeError:
    return RecipeError(
        where,
        got="nothing" if given is None else "an empty list" if given == [] else repr(given),
        wanted="a list of points, each a name and dotted keys of the recipe",
        next_step=f"Example: {_POINTS}.",
    )


def _axes(grid: Any, where: str) -> dict[str, list[Any]]:
    if not isinstance(grid, Mapping) or not grid:
        raise RecipeError(where, got=repr(grid), wanted="a list of values for each dotted key", next_step=_GRID)
    for key, values in grid.items():
        if not isinstance(values, list) or not values or len({canonical_json(v) for v in values}) < len(values):
            raise RecipeError(f"{where}.{key}", got=repr(values), wanted="a list of different values", next_step=_GRID)
    return {str(key): values for key, values in grid.items()}


def _grid_points(axes: Mapping[str, Sequence[Any]]) -> tuple[list[Any], list[list[int]]]:
    """Returns a point for each combination of values; a grid of one axis of numbers gives them an x."""
    last = [key.rpartition(".")[2] for key in axes]
    words = {key: word if last.count(word) == 1 else key for key, word in zip(axes, last, strict=True)}
    numeric = len(axes) == 1 and all(map(_is_number, next(iter(axes.values()))))
    points, places = [], []
    for place in itertools.product(*(range(len(values)) for values in axes.values())):
        settings = {key: values[index] for (key, values), index in zip(axes.items(), place, strict=True)}
        name = ", ".join(f"{words[key]} {as_text(value)}" for key, value in settings.items())
        points.append({"name": name, **({"x": next(iter(settings.values()))} if numeric else {}), **settings})
        places.append(list(place))
    return points, places


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _baseline(given: Any, points: Sequence[Any], where: str) -> dict[str, Any] | None:
    if given is None:
        return None
    if isinstance(given, Mapping):
        return {"name": "baseline", **given}
    named = {str(point.get("name")): point for point in points if isinstance(point, dict)}
    if isinstance(given, str) and given in named:
        return named[given]
    raise RecipeError(
        where,
        got=f"{given!r}, which is no point of this sweep",
        wanted="the name of a point, or dotted keys of the recipe",
        next_step=nearest(str(given), list(named)) if named else "Example: baseline: {method: lora}.",
    )
