"""What a repair did: drift, what is kept of the task, scores of base, adapter and repaired adapter, and the sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console

from keeptune.report.grid import print_grid, table_frame
from keeptune.report.sweep import sweep_figure

__all__ = ["print_repair", "repair_figure"]


def print_repair(record: Mapping[str, Any], console: Console) -> None:
    """Print a repair.

    Args:
        record: As in ``repair.json``.
        console: Where to print.
    """
    cells: dict[tuple[int | None, str], list[str]] = {}
    for row in record["targets"]:
        text = f"{100 * row['drift_before']:.2f} > {100 * row['drift']:.2f}"
        cells.setdefault((row["layer"], row["role"]), []).append(text)
    console.print("relative feature drift on the knowledge, %, before > after", markup=False)
    print_grid(cells, console)
    kept, error = record["task_kept"], record["task_error"]
    lines = [f"mu {record['mu']:.4g}: mean drift {record['drift_before']:.4g} > {record['drift']:.4g}"]
    if kept is not None:
        lines.append(f"kept of what the adapter does on the task: {kept:.1%}, relative error {error:.1%}")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if "sweep" in record:
        _print_sweep(record, console)
    if "scores" in record:
        _print_scores(record["scores"], console)


def repair_figure(record: Mapping[str, Any]) -> Figure | None:
    """Plot the scores at each μ of a sweep; dotted lines are the base.

    Args:
        record: As in ``repair.json``.

    Returns:
        The figure; None where there is no sweep, or nothing was scored.
    """
    if "sweep" not in record or "scores" not in record:
        return None
    rows = [_point(record["scores"], f"mu {entry['mu']:g}", entry["mu"]) for entry in record["sweep"]]
    adapter = _point(record["scores"], "adapter", None)
    rows = [*rows, adapter] if rows and all(row["x"] > 0 for row in rows) else rows
    caption = "bars: 95% intervals; dotted: the base model; dashed: the adapter as it was"
    return sweep_figure({"rows": rows, "axis": "mu", "baseline": "adapter", "caption": caption})


def _point(scores: Sequence[Mapping[str, Any]], label: str, x: float | None) -> dict[str, Any]:
    benchmarks = []
    for row in scores:
        found = next(entry for entry in row["models"] if entry["label"] == label)
        item = {"before": row["base"], "after": found["score"], "interval": found["interval"]}
        benchmarks.append({key: row[key] for key in ("name", "role", "metric")} | item)
    empty = {"K": None, "T": None, "KT": None}
    return {"name": label, "x": x, "seed": 0, "method": "repair", "benchmarks": benchmarks} | empty


def _print_sweep(record: Mapping[str, Any], console: Console) -> None:
    table = table_frame()
    for head in ("mu", "drift", "kept", "task error"):
        table.add_column(head, justify="right")
    for row in record["sweep"]:
        shares = ["–" if row[key] is None else f"{row[key]:.1%}" for key in ("task_kept", "task_error")]
        table.add_row(f"{row['mu']:g}", f"{row['drift']:.2g}", *shares)
    console.print(table)


def _print_scores(scores: Sequence[Mapping[str, Any]], console: Console) -> None:
    table = table_frame()
    for head in ("", "base", *(entry["label"] for entry in scores[0]["models"])):
        table.add_column(head, justify="right" if head else "left")
    for row in scores:
        cells = [f"{row['name']} ({'keep' if row['role'] == 'knowledge' else 'learn'})", f"{row['base']:.3f}"]
        for entry in row["models"]:
            low, high = entry["interval_to_first"] or (None, None)
            note = "" if low is None else f"\n{low:+.3f} to {high:+.3f}"
            cells.append(f"{entry['score']:.3f}{note}")
        table.add_row(*cells)
    console.print(table)
    console.print("below a score: 95% interval of its difference to the adapter's, on the same items", markup=False)
