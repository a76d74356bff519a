"""The ``sweep:`` section of a recipe: points, or a grid of values, each an entry of a comparison.

sweep:
  grid: {method.strength: [0.1, 1, 10], method.batches: [1, 2, 3]}
  baseline: {method: {name: lora, rank: 8}}     # settings, or the name of one of `points`
  points: [{name: full, method: full}]          # more points outside the grid
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from keeptune.core.errors import RecipeError, nearest
from keeptune.experiments.compare_section import Different, checked
from keeptune.experiments.entries import Entry, as_text, check_label, check_labels, check_settings
from keeptune.recipe.sections import Section

_POINTS = 'sweep: [{name: "rank 4", method.rank: 4}, {name: "rank 8", method.rank: 8}]'


class _Sweep(Section):
    grid: dict[str, Annotated[list[Any], Field(min_length=1), Different]] | None = Field(None, min_length=1)
    points: list[Any] = []
    baseline: Any = None


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
    sweep = checked(_Sweep, section, where, "sweep.")
    about: dict[str, Any] = {}
    points: list[Any] = []
    if sweep.grid is not None:
        points, places = _grid_points(sweep.grid)
        about["grid"] = {
            "axes": [{"key": key, "values": values} for key, values in sweep.grid.items()],  # JSON sorts a mapping
            "cells": {point["name"]: place for point, place in zip(points, places, strict=True)},
        }
    points += sweep.points
    given, named = sweep.baseline, {str(point.get("name")): point for point in points if isinstance(point, dict)}
    if isinstance(given, Mapping):
        points.append({"name": "baseline", **given})
        about["baseline"] = points[-1]["name"]
    elif given is not None:
        if not isinstance(given, str) or given not in named:
            raise RecipeError(
                f"{where}, key sweep.baseline",
                got=f"{given!r}, which is no point of this sweep",
                wanted="the name of a point, or dotted keys of the recipe",
                next_step=nearest(str(given), list(named)) if named else "Example: baseline: {method: lora}.",
            )
        about["baseline"] = given
    return points, about


def point_entries(points: Any, where: str) -> tuple[Entry, ...]:
    """Reads points (``name``, perhaps ``x``, and the dotted keys that each changes) as entries of a comparison."""
    if not isinstance(points, list) or not points or not all(isinstance(point, dict) for point in points):
        raise RecipeError(
            f"{where}, key sweep",
            got="nothing" if points is None else "an empty list" if points == [] else repr(points),
            wanted="a list of points, each a name and dotted keys of the recipe",
            next_step=f"Example: {_POINTS}.",
        )
    entries = []
    for number, point in enumerate(points, start=1):
        name = check_label(point.get("name"), f"{where}, sweep point {number}", _POINTS)
        place, x = f"{where}, sweep point {name}", point.get("x")
        if x is not None and (type(x) not in (int, float) or not math.isfinite(x)):
            raise RecipeError(
                place, got=f"x: {x!r}", wanted="a number: the point's place on the axis", next_step="Correct it."
            )
        settings = {key: value for key, value in point.items() if key not in ("name", "x")}
        check_settings(settings, place)
        entries.append(Entry(name, settings, x=None if x is None else float(x)))
    check_labels(entries, f"{where}, key sweep", "Rename one of them, or list the points of a grid under `points`.")
    return tuple(entries)


def axis_of(entries: Sequence[Entry]) -> str | None:
    """Returns the key whose values are the entries' x, if there is one."""
    with_x = [entry for entry in entries if entry.x is not None]
    keys = [key for key in with_x[0].settings if all(e.settings.get(key) == e.x for e in with_x)] if with_x else []
    return keys[0] if keys else None


def _grid_points(axes: Mapping[str, Sequence[Any]]) -> tuple[list[Any], list[list[int]]]:
    last = [key.rpartition(".")[2] for key in axes]
    words = {key: word if last.count(word) == 1 else key for key, word in zip(axes, last, strict=True)}
    numeric = len(axes) == 1 and all(type(value) in (int, float) for value in next(iter(axes.values())))
    points, places = [], []
    for place in itertools.product(*(range(len(values)) for values in axes.values())):
        settings = {key: values[index] for (key, values), index in zip(axes.items(), place, strict=True)}
        name = ", ".join(f"{words[key]} {as_text(value)}" for key, value in settings.items())
        points.append({"name": name, **({"x": next(iter(settings.values()))} if numeric else {}), **settings})
        places.append(list(place))
    return points, places
