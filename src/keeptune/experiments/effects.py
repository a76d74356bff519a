"""What the cells of a grid gained over a baseline, seed by seed."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from keeptune.core.intervals import lower_is_better, mean_of_seeds
from keeptune.experiments.front import as_json

_BOTH: Final = "mean of learned and kept"
Rows = Sequence[Mapping[str, Any]]
Places = dict[tuple[int, ...], dict[int, float]]


def benefits(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the benefit of each cell of a grid of two axes over the baseline, seed by seed.

    The record has, as ``runs.json``, ``rows`` (finished runs), ``grid`` and perhaps ``baseline`` (else the base model).

    Returns:
        For each benchmark, and for the mean of learned and kept, a table of ``cells`` (``mean``, ``low``, ``high`` and
        ``seeds``; None where there is none) with the means over ``rows``, ``columns`` and all; empty for other grids.
    """
    grid = record.get("grid")
    if grid is None or len(grid["axes"]) != 2:
        return []
    rows: Rows = record["rows"]
    kinds = {item["name"]: item for row in rows for item in row["benchmarks"]}
    places = {name: _by_cell(rows, grid, name, record.get("baseline")) for name in kinds}
    tables = [
        {"name": name, "role": kind["role"], "unit": _unit(kind), **_table(places[name], grid)}
        for name, kind in kinds.items()
    ]
    sides = [
        [places[n] for n, kind in kinds.items() if kind["role"] == role and _unit(kind) == "points"]
        for role in ("task", "knowledge")
    ]
    if all(sides):
        tables.append({"name": _BOTH, "role": "both", "unit": "points", **_table(_balanced(sides), grid)})
    return tables


def _by_cell(rows: Rows, grid: Mapping[str, Any], name: str, baseline: str | None) -> Places:
    scores: dict[tuple[str, int], Mapping[str, Any]] = {
        (row["name"], row["seed"]): item for row in rows for item in row["benchmarks"] if item["name"] == name
    }
    places: Places = {}
    for (point, seed), item in scores.items():
        rival = item["before"] if baseline is None else scores.get((baseline, seed), {}).get("after")
        if point in grid["cells"] and rival is not None:
            better = -1.0 if _unit(item) == "nats" else 100.0
            places.setdefault(tuple(grid["cells"][point]), {})[seed] = better * (item["after"] - rival)
    return places


def _balanced(sides: Sequence[Sequence[Places]]) -> Places:
    every = [benchmark for side in sides for benchmark in side]
    places: Places = {}
    for place, seeds in every[0].items():
        for seed in seeds:
            if all(seed in benchmark.get(place, {}) for benchmark in every):
                means = [math.fsum(benchmark[place][seed] for benchmark in side) / len(side) for side in sides]
                places.setdefault(place, {})[seed] = sum(means) / 2
    return places


def _table(places: Places, grid: Mapping[str, Any]) -> dict[str, Any]:
    high, wide = (len(axis["values"]) for axis in grid["axes"])
    cells = [[_cell(places.get((down, across), {})) for across in range(wide)] for down in range(high)]
    return {
        "cells": cells,
        "rows": [*map(_mean, cells)],
        "columns": [*map(_mean, zip(*cells, strict=True))],
        "mean": _mean([cell for line in cells for cell in line]),
    }


def _cell(seeds: Mapping[int, float]) -> dict[str, Any] | None:
    estimate = mean_of_seeds(list(seeds.values()))
    if estimate is None:
        return None
    numbers = {key: value for key, value in as_json(estimate).items() if key != "sd"}
    return numbers | {"seeds": {str(seed): value for seed, value in seeds.items()}}


def _mean(line: Sequence[Mapping[str, Any] | None]) -> float | None:
    values = [cell["mean"] for cell in line if cell is not None]
    return math.fsum(values) / len(values) if values and len(values) == len(line) else None


def _unit(benchmark: Mapping[str, Any]) -> str:
    return "nats" if lower_is_better(benchmark["metric"]) else "points"
