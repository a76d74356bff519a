"""Tables of single stages: a plan, the points of a sweep, and scores before and after."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console

from keeptune.report.numbers import count, gap, number
from keeptune.report.tables.terminal import print_grid, say, table

Row = Mapping[str, Any]


def print_plan(rows: Sequence[Row], console: Console, notes: Sequence[str] = ()) -> None:
    """Prints ``plan`` of ``report.json``: ranks and importances by layer and role, and the largest start error."""
    if not rows:
        console.print("The plan is empty.")
        return
    say(console, "rank")
    print_grid(_cells(rows, lambda row: str(row.get("rank"))), console)
    weighed = [row for row in rows if _importance(row) is not None]
    if weighed:
        say(console, "\nimportance")
        print_grid(_cells(weighed, lambda row: gap(_importance(row))), console)
    for index, note in enumerate(notes):
        say(console, f"\n{note}" if index == 0 else note)
    errors = [row["start_error"] for row in rows if row.get("start_error") is not None]
    if errors:
        say(console, f"start error: at most {gap(max(errors))}")
    total = sum(row.get("trained_parameters") or 0 for row in rows)
    ending = f", {total:,} trained parameters ({count(total)})" if total else ""
    say(console, f"{len(rows)} targets{ending}")


def print_points(points: Sequence[tuple[str, float | None, Row, Sequence[int]]], console: Console) -> None:
    """Prints the points of a sweep and what each changes: name, place on the axis, settings and seeds."""
    rows = [
        (
            name,
            "–" if x is None else f"{x:g}",
            "\n".join(f"{key}: {value}" for key, value in settings.items()) or "nothing",
            ", ".join(map(str, seeds)),
        )
        for name, x, settings, seeds in points
    ]
    console.print(table(("point", "x", "changes", "seeds"), rows, ("point", "changes", "seeds")))


def print_scores(summaries: Sequence[Row], console: Console) -> None:
    """Prints benchmark scores before and after, with the interval of the change."""
    if not summaries:
        console.print("The recipe lists no benchmarks under `evaluate`.")
        return
    rows = [
        (
            *(str(item[key]) for key in ("name", "role")),
            f"{item['metric']}, chat" if item.get("chat") else str(item["metric"]),
            str(item["n"]),
            *(number(item[key]) for key in ("before", "after")),
            f"[{item['interval'][0]:+.3f}, {item['interval'][1]:+.3f}]",
        )
        for item in summaries
    ]
    left = ("benchmark", "role", "metric")
    console.print(table((*left, "items", "before", "after", "95% interval of the change"), rows, left))


def print_check(record: Row, console: Console) -> None:
    """Prints what each benchmark of a check lost, with its interval, its limit and the verdict; and the whole one."""
    rows = [
        (
            str(item["name"]),
            str(item["n"]),
            *(number(item[key]) for key in ("before", "after")),
            f"{item['loss']:+.4f}",
            "[{:+.4f}, {:+.4f}]".format(*item["loss_interval"]),
            "–" if item["limit"] is None else f"{item['limit']:g}",
            "LOST" if item["lost"] else "kept",
        )
        for item in record["benchmarks"]
    ]
    heads = ("benchmark", "items", "base", "tuned", "lost", "95% interval", "limit", "verdict")
    console.print(table(heads, rows, ("benchmark", "verdict")))
    lost = [item["name"] for item in record["benchmarks"] if item["lost"]]
    words = f"lost more than it may: {', '.join(lost)}" if lost else "nothing lost more than it may"
    say(console, f"{words} (by the {record['estimate']} of the loss)")


def _cells(rows: Sequence[Row], write: Callable[[Row], str]) -> dict[tuple[int | None, str], list[str]]:
    cells: dict[tuple[int | None, str], list[str]] = {}
    for row in rows:
        cells.setdefault((row.get("layer"), str(row.get("role"))), []).append(write(row))
    return cells


def _importance(row: Row) -> float | None:
    values = (row.get("evidence") or {}).get("importance")
    return float(values[0]) if isinstance(values, list | tuple) and len(values) == 1 else None
