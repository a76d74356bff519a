"""keeptune compare: from the recipe to the records: cells, engine, rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keeptune.compare import record
from keeptune.compare.cell import Outcome
from keeptune.compare.cells import Cell, Comparison, grid
from keeptune.compare.engine import run_cells

__all__ = ["Compared", "rows_of", "run_comparison", "write_found"]


@dataclass(frozen=True)
class Compared:
    """What a comparison gave.

    Args:
        cells: What ``cells.json`` holds.
        front: What ``front.json`` holds.
        failed: Name of each cell that failed to its message.
    """

    cells: dict[str, Any]
    front: dict[str, Any]
    failed: Mapping[str, str]


def run_comparison(comparison: Comparison, command: str) -> Compared:
    """Run what is missing of a comparison and write its records.

    Args:
        comparison: The comparison.
        command: What repeats it.

    Returns:
        What was found.

    Raises:
        KeeptuneError: Something the user can mend.
    """
    cells = grid(comparison)
    outcomes = run_cells(comparison, cells)
    return write_found(comparison, cells, outcomes, command)


def write_found(
    comparison: Comparison, cells: Sequence[Cell], outcomes: Mapping[str, Outcome], command: str
) -> Compared:
    """Write ``cells.json``, ``cells.parquet`` and ``front.json``.

    Args:
        comparison: The comparison.
        cells: Its cells.
        outcomes: How they ended.
        command: What repeats it.

    Returns:
        What was found.
    """
    section = comparison.section
    found, front = record.write_records(
        comparison.output,
        rows_of(cells, outcomes),
        base=comparison.base.model,
        command=command,
        recipe={**comparison.values, "compare": section.model_dump(mode="json")},
        options=record.Options(learned=section.learned, forgotten=section.forgotten, baseline=comparison.plain),
    )
    failed = {name: outcome.message for name, outcome in outcomes.items() if outcome.status == "failed"}
    return Compared(found, front, failed)


def rows_of(cells: Sequence[Cell], outcomes: Mapping[str, Outcome]) -> list[record.Cell]:
    """Describe cells to the records.

    Args:
        cells: The cells.
        outcomes: How they ended; of a cell that is not there, nothing is known.

    Returns:
        A row each.
    """
    rows = []
    for cell in cells:
        outcome = outcomes.get(cell.name, Outcome("missing", "not run"))
        rows.append(
            record.Cell(
                name=cell.name,
                label=cell.label,
                method=cell.method,
                settings=cell.settings,
                learning_rate=cell.learning_rate,
                strength=cell.strength,
                seed=cell.seed,
                folder=cell.recipe.output,
                status=outcome.status,
                message=outcome.message,
            )
        )
    return rows
