"""Rows of a comparison as a table, for pandas, DuckDB and the like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from keeptune.core.artefact import canonical_json

__all__ = ["table_of"]


def table_of(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Make a table of rows: one line a cell, benchmarks as columns.

    Args:
        rows: Rows of ``runs.json``.

    Returns:
        A pyarrow table; settings and knob are JSON text, of each benchmark ``<name>.before``, ``.after``, ``.low``,
        ``.high`` (of after - before) and ``.n``.
    """
    import pyarrow as pa

    names = list(dict.fromkeys(b["name"] for row in rows for b in row["benchmarks"]))
    text, number, whole = pa.string(), pa.float64(), pa.int64()
    columns: dict[str, tuple[Any, list[Any]]] = {
        key: (text, [row.get(key) for row in rows]) for key in ("name", "label", "of", "method", "status", "message")
    }
    for key in ("settings", "variant"):
        columns[key] = (text, [None if row[key] is None else canonical_json(row[key]) for row in rows])
    for key in ("learning_rate", "strength", "learned", "forgotten"):
        columns[key] = (number, [row[key] for row in rows])
    columns |= {key: (whole, [row[key] for row in rows]) for key in ("seed", "trained_parameters")}
    for stage in ("plan", "train", "evaluate"):
        columns[f"seconds.{stage}"] = (number, [row["seconds"][stage] for row in rows])
    for name in names:
        found = [next((b for b in row["benchmarks"] if b["name"] == name), None) for row in rows]
        ends = [(None, None) if b is None or b["interval"] is None else b["interval"] for b in found]
        for side in ("before", "after"):
            columns[f"{name}.{side}"] = (number, [b and b[side] for b in found])
        columns[f"{name}.low"] = (number, [low for low, _ in ends])
        columns[f"{name}.high"] = (number, [high for _, high in ends])
        columns[f"{name}.n"] = (whole, [b and b["n"] for b in found])
    columns["folder"] = (text, [row["folder"] for row in rows])
    return pa.table({key: pa.array(values, type=kind) for key, (kind, values) in columns.items()})
