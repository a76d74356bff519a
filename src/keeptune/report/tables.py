"""Comparison and plan tables for the terminal, for Markdown and for the HTML page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from rich.console import Console
from rich.text import Text

from keeptune.core.intervals import Estimate, combine
from keeptune.report.grid import table_frame
from keeptune.report.records import Benchmark, ReportLike, Run, as_report
from keeptune.report.summary import Method, Series, change, mean_of, methods, series
from keeptune.report.wording import change_interval, count, gap, number

__all__ = [
    "Cell",
    "Column",
    "comparison_columns",
    "comparison_rows",
    "markdown_comparison",
    "print_comparison",
]


@dataclass(frozen=True)
class Cell:
    """A table cell: a value and, below it, its interval (may be empty)."""

    main: str
    note: str


@dataclass(frozen=True)
class Column:
    """A table column: heading, what stands below the heading, and one cell for each method."""

    head: str
    sub: tuple[str, ...]
    cells: tuple[Cell, ...]


_METHOD_WIDTH: Final = 22


def comparison_rows(report: ReportLike) -> list[dict[str, Any]]:
    """Put the numbers of a comparison into one row for each method.

    Args:
        report: The report.

    Returns:
        Rows with `method`, `seeds` (list), `knowledge` and `task` (by benchmark: `metric`, `n`, `before`,
        `after`, `change`, `low`, `high`), `K`, `average_forgetting`, `T`, `KT` (each None or `mean`, `low`,
        `high`, NaN where there is no interval), `trained_parameters` and `export_gap` (the largest of the seeds).

    Raises:
        ArtefactError: The report is malformed.
    """
    parsed = as_report(report)
    rows: list[dict[str, Any]] = []
    for method in methods(parsed):
        row: dict[str, Any] = {"method": method.label, "seeds": [run.seed for run in method.runs]}
        for role in ("knowledge", "task"):
            each = {item.name: _benchmark_numbers(method, item) for item in series(parsed, role)}
            row[role] = {name: numbers for name, numbers in each.items() if numbers is not None}
        for key, read in _scores().items():
            found = mean_of(method, read)
            row[key] = {"mean": found.mean, "low": found.low, "high": found.high} if found else None
        row["trained_parameters"] = _largest(method, lambda run: run.trained_parameters)
        row["export_gap"] = _largest(method, lambda run: run.export_gap)
        rows.append(row)
    return rows


def comparison_columns(report: ReportLike) -> list[Column]:
    """Format the comparison: first the methods, then a column for each quantity.

    Args:
        report: The report.

    Returns:
        The columns; those in which every cell would be empty are left out.

    Raises:
        ArtefactError: The report is malformed.
    """
    parsed = as_report(report)
    rows = comparison_rows(parsed)
    columns = [_method_column(rows)]
    for role in ("knowledge", "task"):
        columns += [_benchmark_column(item, rows) for item in series(parsed, role)]
    columns += [Column(key, (), tuple(_score_cell(row[key]) for row in rows)) for key in ("K", "T", "KT")]
    drops = tuple(_score_cell(row["average_forgetting"], percent=True) for row in rows)
    columns.append(Column("forgetting", ("average",), drops))
    trained = tuple(Cell(count(row["trained_parameters"]), "") for row in rows)
    gaps = tuple(Cell(gap(row["export_gap"]), "") for row in rows)
    columns += [Column("trained", ("params",), trained), Column("export", ("gap",), gaps)]
    return [columns[0], *(item for item in columns[1:] if any(cell.main != "–" for cell in item.cells))]


def print_comparison(report: ReportLike, console: Console) -> None:
    """Print the comparison; columns that do not fit go into further tables below.

    Args:
        report: The report.
        console: Where to print.

    Raises:
        ArtefactError: The report is malformed.
    """
    columns = comparison_columns(report)
    for part, group in enumerate(_fitting(columns, console.width)):
        if part:
            console.print()
        table = table_frame()
        for index, column in enumerate(group):
            head = Text(column.head).append("".join(f"\n{line}" for line in column.sub), style="dim")
            if index == 0:
                table.add_column(head, max_width=_METHOD_WIDTH, overflow="fold")
            else:
                table.add_column(head, justify="right", no_wrap=True)
        for row in zip(*(column.cells for column in group), strict=True):
            table.add_row(*(_rich_cell(cell, console.encoding) for cell in row))
        console.print(table)
    if any(cell.note for column in columns[1:] for cell in column.cells):
        note = "In brackets: 95% interval of the change (points, or nats/token); ±: 95% interval over seeds."
        console.print(_plain(Text(note, style="dim"), console.encoding))


def markdown_comparison(report: ReportLike) -> str:
    """Write the comparison as a Markdown table.

    Args:
        report: The report.

    Returns:
        The table, ending with a newline.

    Raises:
        ArtefactError: The report is malformed.
    """
    columns = comparison_columns(report)
    heads = [_escape(", ".join((item.head, *item.sub))) for item in columns]
    lines = [heads, ["---", *("---:" for _ in columns[1:])]]
    for row in zip(*(column.cells for column in columns), strict=True):
        lines.append([_escape(" ".join(part for part in (cell.main, cell.note) if part)) for cell in row])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _scores() -> dict[str, Callable[[Run], float | None]]:
    """List the summary scores of a run.

    Returns:
        A reader for each score.
    """
    return {
        "K": lambda run: run.K,
        "average_forgetting": lambda run: run.average_forgetting,
        "T": lambda run: run.T,
        "KT": lambda run: run.KT,
    }


def _largest(method: Method, read: Callable[[Run], float | None]) -> float | None:
    """Take the largest value among the seeds.

    Args:
        method: The method.
        read: Takes the value from a run.

    Returns:
        The largest value, None when there is none.
    """
    return max((value for value in map(read, method.runs) if value is not None), default=None)


def _benchmark_numbers(method: Method, kind: Series) -> dict[str, Any] | None:
    """Average one benchmark over the seeds.

    Args:
        method: The method.
        kind: The benchmark.

    Returns:
        The numbers, None when no run has them.
    """
    rows: list[Benchmark] = [item for run in method.runs for item in run.benchmarks if item.name == kind.name]
    moved = change(method, kind.name)
    before = combine([(item.before, item.before, item.before) for item in rows])
    after = combine([(item.after, item.after, item.after) for item in rows])
    if moved is None or before is None or after is None:
        return None
    return {
        "metric": kind.metric,
        "n": max(item.n for item in rows),
        "before": before.mean,
        "after": after.mean,
        "change": moved.mean,
        "low": moved.low,
        "high": moved.high,
    }


def _method_column(rows: Sequence[Mapping[str, Any]]) -> Column:
    """Make the first column.

    Args:
        rows: The rows.

    Returns:
        The methods, with the number of seeds where there are several.
    """
    notes = [f"({len(row['seeds'])} seeds)" if len(row["seeds"]) > 1 else "" for row in rows]
    cells = tuple(Cell(row["method"], note) for row, note in zip(rows, notes, strict=True))
    return Column("method", (), cells)


def _benchmark_column(kind: Series, rows: Sequence[Mapping[str, Any]]) -> Column:
    """Make the column of one benchmark.

    Args:
        kind: The benchmark.
        rows: The rows.

    Returns:
        Before and after, with the interval of the change below.
    """
    cells = []
    for row in rows:
        found = row[kind.role].get(kind.name)
        if found is None:
            cells.append(Cell("–", ""))
            continue
        moved = Estimate(found["change"], found["low"], found["high"], ())
        cells.append(Cell(f"{number(found['before'])} → {number(found['after'])}", change_interval(moved, kind)))
    unit = "nats/token" if kind.lower_is_better else "accuracy"
    return Column(kind.name, (kind.role, unit), tuple(cells))


def _score_cell(found: Mapping[str, float] | None, *, percent: bool = False) -> Cell:
    """Format K, T or KT, or average forgetting.

    Args:
        found: Mean, low and high end.
        percent: Whether it is written in per cent.

    Returns:
        The cell; below the mean stands half the width of the interval over seeds.
    """
    if found is None:
        return Cell("–", "")
    half = (found["high"] - found["low"]) / 2
    if percent:
        note = f"±{number(100 * half, 2)}" if math.isfinite(half) else ""
        return Cell(f"{number(100 * found['mean'], 2)}%", note)
    return Cell(number(found["mean"]), f"±{number(half)}" if math.isfinite(half) else "")


def _fitting(columns: Sequence[Column], width: int) -> list[list[Column]]:
    """Split the columns into groups that fit side by side.

    Args:
        columns: The columns, the methods first.
        width: How many characters fit.

    Returns:
        The groups; each begins with the methods.
    """
    first = columns[0]
    groups: list[list[Column]] = [[first]]
    used = _width(first)
    for block in _blocks(columns[1:]):
        wide = sum(_width(column) + 2 for column in block)
        if used + wide > width and len(groups[-1]) > 1:
            groups.append([first])
            used = _width(first)
        groups[-1] += block
        used += wide
    return groups


def _blocks(columns: Sequence[Column]) -> list[list[Column]]:
    """Bind together the columns that read as one.

    Args:
        columns: The columns after the methods.

    Returns:
        One block for each benchmark, one for the scores, one for the costs.
    """
    together = dict.fromkeys(("K", "T", "KT", "forgetting"), "scores") | dict.fromkeys(("trained", "export"), "costs")
    blocks: dict[str, list[Column]] = {}
    for index, column in enumerate(columns):
        key = str(index) if len(column.sub) == 2 else together[column.head]
        blocks.setdefault(key, []).append(column)
    return list(blocks.values())


def _width(column: Column) -> int:
    """Measure a column.

    Args:
        column: The column.

    Returns:
        The length of its longest text; the methods wrap.
    """
    texts = [column.head, *column.sub, *(part for cell in column.cells for part in (cell.main, cell.note))]
    widest = max(Text(text).cell_len for text in texts)
    return min(widest, _METHOD_WIDTH) if column.head == "method" and not column.sub else widest


def _rich_cell(cell: Cell, encoding: str) -> Text:
    """Draw a cell.

    Args:
        cell: The cell.
        encoding: The encoding of the terminal.

    Returns:
        The text.
    """
    text = Text(cell.main).append(f"\n{cell.note}" if cell.note else "", style="dim")
    return _plain(text, encoding)


def _plain(text: Text, encoding: str) -> Text:
    """Spell signs with plain characters on terminals without Unicode.

    Args:
        text: The text.
        encoding: The encoding of the terminal.

    Returns:
        The text.
    """
    if encoding.lower().startswith("utf"):
        return text
    return Text(text.plain.replace("→", "->").replace("−", "-").replace("–", "-").replace("±", "+-"))


def _escape(text: str) -> str:
    """Keep a text inside its Markdown cell.

    Args:
        text: The text.

    Returns:
        The text with pipes and angle brackets escaped and no line break.
    """
    safe = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    return " ".join(safe.split())
