"""Tables of single stages for the terminal: a plan, and scores before and after."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from keeptune.report.grid import print_grid, table_frame
from keeptune.report.wording import count, gap, importance, number

__all__ = ["print_plan", "print_points", "print_scores"]


def print_plan(rows: Sequence[Mapping[str, Any]], console: Console, notes: Sequence[str] = ()) -> None:
    """Print a plan: a line for each target, or ranks by layer and role where they differ, and what they rest on.

    Args:
        rows: Mappings with any of `layer`, `role`, `rank`, `trained_parameters`, `start_error`, and `evidence`, in
            which `importance` is a list of one number.
        console: Where to print.
        notes: What the method has to say about the plan.
    """
    if not rows:
        console.print("The plan is empty.")
        return
    ranks = {row.get("rank") for row in rows}
    if len(ranks) > 1:
        _say(console, "rank")
        print_grid(_cells(rows, lambda row: str(row.get("rank"))), console)
    else:
        console.print(_target_table(rows))
    found = [row for row in rows if _importance(row) is not None]
    if found:
        _say(console, "\nimportance")
        print_grid(_cells(found, lambda row: importance(_importance(row))), console)
    for index, note in enumerate(notes):
        _say(console, f"\n{note}" if index == 0 else note)
    errors = [row["start_error"] for row in rows if row.get("start_error") is not None]
    if errors and len(ranks) > 1:
        _say(console, f"start error: at most {gap(max(errors))}")
    total = sum(row.get("trained_parameters") or 0 for row in rows)
    ending = f", {total:,} trained parameters ({count(total)})" if total else ""
    _say(console, f"{len(rows)} targets{ending}")


def _say(console: Console, text: str) -> None:
    console.print(Text(text), soft_wrap=True)


def _cells(
    rows: Sequence[Mapping[str, Any]], write: Callable[[Mapping[str, Any]], str]
) -> dict[tuple[int | None, str], list[str]]:
    cells: dict[tuple[int | None, str], list[str]] = {}
    for row in rows:
        cells.setdefault((row.get("layer"), str(row.get("role"))), []).append(write(row))
    return cells


def _importance(row: Mapping[str, Any]) -> float | None:
    values = (row.get("evidence") or {}).get("importance")
    return float(values[0]) if isinstance(values, list | tuple) and len(values) == 1 else None


def _target_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = table_frame()
    writers: dict[str, tuple[str, Callable[[Any], str]]] = {
        "layer": ("layer", lambda value: "–" if value is None else str(value)),
        "role": ("role", lambda value: "–" if value is None else str(value)),
        "rank": ("rank", lambda value: "–" if value is None else str(value)),
        "trained_parameters": ("trained params", lambda value: "–" if value is None else f"{value:,}"),
        "start_error": ("start error", gap),
    }
    shown = [key for key in writers if any(row.get(key) is not None for row in rows)]
    for key in shown:
        table.add_column(writers[key][0], justify="left" if key == "role" else "right")
    for index, row in enumerate(rows):
        last = index + 1 == len(rows) or rows[index + 1].get("layer") != row.get("layer")
        cells = [Text(writers[key][1](row.get(key))) for key in shown]
        table.add_row(*cells, end_section=last)
    return table


def print_points(
    points: Sequence[tuple[str, float | None, Mapping[str, Any], Sequence[int]]], console: Console
) -> None:
    """Print the points of a sweep and what each changes.

    Args:
        points: Name, place on the axis, dotted key to value, and seeds of each point.
        console: Where to print.
    """
    table = table_frame()
    for head in ("point", "x", "changes", "seeds"):
        table.add_column(head, justify="right" if head == "x" else "left")
    for name, x, settings, seeds in points:
        changes = "\n".join(f"{key}: {value}" for key, value in settings.items()) or "nothing"
        cells = (name, "–" if x is None else f"{x:g}", changes, ", ".join(map(str, seeds)))
        table.add_row(*map(Text, cells))
    console.print(table)


def print_scores(summaries: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print benchmark scores before and after, with the interval of the change.

    Args:
        summaries: Mappings with `name`, `role`, `metric`, `n`, `before`, `after`, `interval`.
        console: Where to print.
    """
    table = table_frame()
    for head in ("benchmark", "role", "metric"):
        table.add_column(head)
    for head in ("items", "before", "after", "95% interval of the change"):
        table.add_column(head, justify="right")
    for item in summaries:
        low, high = item["interval"]
        table.add_row(
            *(str(item[key]) for key in ("name", "role", "metric", "n")),
            *(number(item[key]) for key in ("before", "after")),
            f"[{low:+.3f}, {high:+.3f}]".replace("[", r"\["),
        )
    console.print(table if summaries else "The recipe lists no benchmarks under `evaluate`.")
