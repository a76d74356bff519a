"""keeptune compare: from the recipe to the records: cells, engine, rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keeptune.experiments.comparison import record
from keeptune.experiments.comparison.cell import Outcome
from keeptune.experiments.comparison.cells import Cell, Comparison, grid
from keeptune.experiments.comparison.choice import choose_best, limits_of
from keeptune.experiments.comparison.engine import run_cells
from keeptune.experiments.comparison.knobs import knob_of
from keeptune.experiments.comparison.search import run_search
from keeptune.experiments.comparison.turned import knob_cell
from keeptune.report.pages.comparison_page import write_comparison

__all__ = ["Compared", "rows_of", "run_comparison", "write_found"]


@dataclass(frozen=True)
class Compared:
    """What a comparison gave.

    Args:
        cells: What ``runs.json`` holds.
        front: What ``front.json`` holds.
        failed: Name of each cell that failed to its message.
    """

    cells: dict[str, Any]
    front: dict[str, Any]
    failed: Mapping[str, str]


def run_comparison(
    comparison: Comparison, command: str, max_loss: float | Mapping[str, float] | None = None
) -> Compared:
    """Run what is missing of a comparison, write its records and its page, and export the best result.

    Args:
        comparison: The comparison.
        command: What repeats it.
        max_loss: How much may be lost of what the base knew, of each knowledge benchmark or by name; None chooses
            nothing.

    Returns:
        What was found.

    Raises:
        KeeptuneError: Something the user can mend; where no cell keeps to ``max_loss``, all else is written.
    """
    if max_loss is not None:
        limits_of([{"name": b.name, "role": b.role} for b in comparison.base.evaluate], [], max_loss)
    if comparison.section.search is not None:
        cells, outcomes = run_search(comparison, comparison.section.search)
    else:
        cells = grid(comparison)
        outcomes = run_cells(comparison, cells)
    return write_found(comparison, cells, outcomes, command, max_loss)


def write_found(
    comparison: Comparison,
    cells: Sequence[Cell],
    outcomes: Mapping[str, Outcome],
    command: str,
    max_loss: float | Mapping[str, float] | None = None,
) -> Compared:
    """Write ``runs.json``, ``runs.parquet``, ``front.json``, ``report.html``, and ``best`` where one is chosen.

    Args:
        comparison: The comparison.
        cells: Its cells.
        outcomes: How they ended.
        command: What repeats it.
        max_loss: How much may be lost; None chooses nothing.

    Returns:
        What was found.

    Raises:
        KeeptuneError: No cell keeps to ``max_loss``, or a file cannot be written.
    """
    section, published = comparison.section, comparison.base.published
    found, front = record.write_records(
        comparison.output,
        rows_of(cells, outcomes),
        base=comparison.base.model,
        command=command,
        recipe={**comparison.values, "compare": section.model_dump(mode="json")},
        options=record.Options(
            learned=section.learned,
            forgotten=section.forgotten,
            score=section.score,
            baseline=comparison.plain,
            reference_point=section.reference_point,
        ),
        published=[] if published is None else published.scores(),
    )
    try:
        if max_loss is not None:
            front = front | {"choice": choose_best(comparison.output, max_loss, estimate=section.estimate)}
    finally:
        write_comparison(found, front, comparison.output / "report.html")
    failed = {name: outcome.message for name, outcome in outcomes.items() if outcome.status == "failed"}
    return Compared(found, front, failed)


def rows_of(cells: Sequence[Cell], outcomes: Mapping[str, Outcome]) -> list[record.Cell]:
    """Describe cells to the records.

    Args:
        cells: The cells.
        outcomes: How they ended; of a cell that is not there, nothing is known.

    Returns:
        A row each, and after it one for each knob that was turned on its result.
    """
    rows: list[record.Cell] = []
    for cell in cells:
        outcome = outcomes.get(cell.name, Outcome("missing", "not run"))
        row = record.Cell(
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
        rows += [row, *(knob_cell(row, knob_of(knob)) for knob in outcome.knobs)]
    return rows
