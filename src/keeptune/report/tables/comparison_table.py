"""The table of a comparison: its numbers, and the table for the terminal, Markdown and the page."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from rich.console import Console
from rich.text import Text

from keeptune.core.intervals import mean_of_seeds
from keeptune.report.estimates import Method, Series, change, mean_of, methods, series
from keeptune.report.grids import Cell
from keeptune.report.numbers import count, gap, interval_text, number
from keeptune.report.records import ReportLike, Run, as_report
from keeptune.report.tables.terminal import fitting, table_frame

_METHOD_WIDTH: Final = 22
_SCORES: Final = ("K", "average_forgetting", "T", "KT")


def comparison_rows(report: ReportLike) -> list[dict[str, Any]]:
    """Returns the numbers of a comparison, one row for each method.

    Returns:
        Rows with ``method``, ``seeds``, ``knowledge`` and ``task`` (benchmark to ``metric``, ``n``, ``before``,
        ``after``, ``change``, ``low`` and ``high``), ``K``, ``average_forgetting``, ``T`` and ``KT`` (``mean``, ``low``
        and ``high``, or None), and the largest ``trained_parameters`` and ``export_gap``.
    """
    parsed = as_report(report)
    rows: list[dict[str, Any]] = []
    for method in methods(parsed):
        row: dict[str, Any] = {"method": method.label, "seeds": [run.seed for run in method.runs]}
        for role in ("knowledge", "task"):
            each = {item.name: _benchmark_numbers(method, item) for item in series(parsed, role)}
            row[role] = {name: numbers for name, numbers in each.items() if numbers is not None}
        for key in _SCORES:
            score = mean_of(method, lambda run, key=key: getattr(run, key))  # type: ignore[misc]
            row[key] = {"mean": score.mean, "low": score.low, "high": score.high} if score else None
        row["trained_parameters"] = _largest(method, lambda run: run.trained_parameters)
        row["export_gap"] = _largest(method, lambda run: run.export_gap)
        rows.append(row)
    return rows


def comparison_columns(report: ReportLike) -> list[tuple[Cell, ...]]:
    """Returns the comparison as texts: the methods, then each quantity that any has; columns begin with their head."""
    parsed = as_report(report)
    rows = comparison_rows(parsed)
    names = (
        Cell(row["method"], f"({len(row['seeds'])} seeds)" if len(row["seeds"]) > 1 else "", place)
        for place, row in enumerate(rows)
    )
    columns = [_benchmark_column(item, rows) for role in ("knowledge", "task") for item in series(parsed, role)]
    columns += [(Cell(key), *(_score_cell(row[key]) for row in rows)) for key in ("K", "T", "KT")]
    columns += [
        (Cell("forgetting", "average"), *(_score_cell(row["average_forgetting"], percent=True) for row in rows)),
        (Cell("trained", "params"), *(Cell(count(row["trained_parameters"])) for row in rows)),
        (Cell("export", "gap"), *(Cell(gap(row["export_gap"])) for row in rows)),
    ]
    return [(Cell("method"), *names), *(own for own in columns if any(cell.main != "–" for cell in own[1:]))]


def print_comparison(report: ReportLike, console: Console) -> None:
    """Prints the comparison; columns that do not fit go into further tables below."""
    first, *others = comparison_columns(report)
    widths = [_width(column) + 2 for column in others]
    for part, group in enumerate(fitting(others, widths, console.width - min(_width(first), _METHOD_WIDTH)) or [[]]):
        if part:
            console.print()
        table = table_frame()
        heads, *rows = zip(first, *group, strict=True)
        for place, head in enumerate(heads):
            if place:
                table.add_column(_lines(head), justify="right", no_wrap=True)
            else:
                table.add_column(_lines(head), max_width=_METHOD_WIDTH, overflow="fold")
        for row in rows:
            table.add_row(*(_lines(cell) for cell in row))
        console.print(table)
    if any(cell.note for column in others for cell in column[1:]):
        note = "In brackets: 95% interval of the change (points, or nats/token); ±: half the 95% interval over seeds."
        console.print(Text(note, style="dim"))


def _lines(cell: Cell) -> Text:
    return Text(cell.main).append(f"\n{cell.note}" if cell.note else "", style="dim")


def _largest(method: Method, read: Callable[[Run], float | None]) -> float | None:
    return max((value for value in map(read, method.runs) if value is not None), default=None)


def _benchmark_numbers(method: Method, kind: Series) -> dict[str, Any] | None:
    rows = [item for run in method.runs for item in run.benchmarks if item.name == kind.name]
    moved = change(method, kind.name)
    before, after = mean_of_seeds([item.before for item in rows]), mean_of_seeds([item.after for item in rows])
    if moved is None or before is None or after is None:
        return None
    numbers = {"before": before.mean, "after": after.mean, "change": moved.mean, "low": moved.low, "high": moved.high}
    return {"metric": kind.metric, "n": max(item.n for item in rows), **numbers}


def _benchmark_column(kind: Series, rows: Sequence[Mapping[str, Any]]) -> tuple[Cell, ...]:
    cells = [Cell(kind.name, f"{kind.role}\n{'nats/token' if kind.lower_is_better else 'accuracy'}")]
    for row in rows:
        own = row[kind.role].get(kind.name)
        scores = "–" if own is None else f"{number(own['before'])} → {number(own['after'])}"
        cells.append(Cell(scores, "" if own is None else interval_text(own["low"], own["high"], kind.lower_is_better)))
    return tuple(cells)


def _score_cell(score: Mapping[str, float] | None, *, percent: bool = False) -> Cell:
    if score is None:
        return Cell("–")
    half, factor, digits = (score["high"] - score["low"]) / 2, 100 if percent else 1, 2 if percent else 3
    note = f"±{number(factor * half, digits)}" if math.isfinite(half) else ""
    return Cell(f"{number(factor * score['mean'], digits)}{'%' if percent else ''}", note)


def _width(column: tuple[Cell, ...]) -> int:
    return max(Text(line).cell_len for cell in column for line in (cell.main, *cell.note.split("\n")))
