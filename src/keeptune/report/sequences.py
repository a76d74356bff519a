"""Reading of ``sequence.json``: the rows of its matrix, and its columns by unit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from keeptune.core.intervals import lower_is_better

Record = Mapping[str, Any]


def row_names(record: Record) -> list[str]:
    """Returns the names of the rows of the matrix: the base, and the model after each stage."""
    return ["base", *(f"after {stage['name']}" for stage in record["stages"])]


def split(record: Record) -> list[tuple[str, list[int]]]:
    """Returns the units, which have no scale in common, with the benchmarks (columns) of each."""
    nats = [i for i, b in enumerate(record["benchmarks"]) if lower_is_better(b["metric"])]
    shares = [i for i in range(len(record["benchmarks"])) if i not in nats]
    return [(unit, columns) for unit, columns in (("accuracy", shares), ("nats/token", nats)) if columns]


def score_table(record: Record, columns: Sequence[int]) -> list[list[float]]:
    """Returns the scores of some benchmarks, a row for the base and each stage, NaN where there is none."""
    return [[math.nan if row[i] is None else float(row[i]) for i in columns] for row in record["scores"]]


def own_stage(record: Record, column: int) -> int | None:
    """Returns the row after the stage that taught a benchmark's task; None for other benchmarks."""
    names = [stage["name"] for stage in record["stages"]]
    stage = record["benchmarks"][column].get("stage")
    return 1 + names.index(stage) if stage in names else None
