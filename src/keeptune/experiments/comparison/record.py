"""The records of a comparison: cells to rows, rows to the trade-off, and both to files.

``runs.json`` and ``runs.parquet`` have a row per cell, ``front.json`` what the rows mean. From rows to trade-off
everything is a pure function; only :func:`row_of` reads run folders and only :func:`write_records` writes.
"""

from __future__ import annotations

import datetime
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from keeptune.core.artefact import read_json, write_bytes, write_json
from keeptune.core.errors import ArtefactError, KeeptuneError
from keeptune.experiments.comparison.axes import Axes, axes_of, forgotten_of, learned_of
from keeptune.experiments.comparison.front import (
    Point,
    families,
    hypervolumes,
    no_trade_off,
    pareto,
    points_of,
    reference_point,
)
from keeptune.experiments.comparison.matched import matched
from keeptune.experiments.comparison.table import table_of
from keeptune.pipeline.scoring import find_result, result_fingerprint

__all__ = [
    "CELLS",
    "FRONT",
    "Cell",
    "Options",
    "read_runs",
    "read_front",
    "row_of",
    "trade_off_of",
    "with_axes",
    "write_records",
]

CELLS, FRONT = "runs.json", "front.json"
_NAMED = 5
Status = Literal["done", "failed", "missing"]
_BENCHMARK = ("name", "role", "metric", "n", "before", "after", "interval")


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A cell of a comparison as the engine knows it.

    Args:
        name: Of its own, with ``-seed<k>``; a knob's cell is named ``<cell>/<knob>``.
        label: What it is compared as.
        method: Its method.
        settings: Dotted recipe key to value: what it changes.
        learning_rate: Its rate.
        strength: The factor on the method's own strength, if it has one.
        variant: What was turned after training, such as ``{"scale": 0.5}``; None for a trained cell.
        of: The label of the cell that a knob was turned on.
        seed: Its seed.
        folder: Its run folder; of a knob, the knob's folder in it.
        status: ``"done"``, ``"failed"`` or ``"missing"``.
        message: Why it failed or is missing.
    """

    name: str
    label: str
    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    learning_rate: float | None = None
    strength: float | None = None
    variant: Mapping[str, Any] | None = None
    of: str | None = None
    seed: int = 0
    folder: Path = Path()
    status: Status = "done"
    message: str = ""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a comparison's recipe says about its axes and tables; None leaves each to the data.

    Args:
        learned: Task benchmarks of the axis.
        forgotten: Knowledge benchmarks of the axis.
        score: Where labels are matched.
        baseline: Label that the others are set against; None takes ``lora`` where it is a label.
        reference_point: ``(learned, forgotten)`` of the hypervolumes.
    """

    learned: Sequence[str] | None = None
    forgotten: Sequence[str] | None = None
    score: float | None = None
    baseline: str | None = None
    reference_point: tuple[float, float] | None = None


def row_of(cell: Cell) -> dict[str, Any]:
    """Read a cell's folder into a row of ``runs.json``, without its axes.

    Args:
        cell: The cell.

    Returns:
        The row. A cell said to be done whose scores are missing, or are of other weights, is ``"missing"``.
    """
    row: dict[str, Any] = {**asdict(cell), "folder": str(cell.folder), "settings": dict(cell.settings)}
    row |= {"seconds": {"plan": None, "train": None, "evaluate": None}, "trained_parameters": None, "benchmarks": []}
    if cell.status != "done":
        return row
    try:
        return row | (_knob_found(cell.folder) if cell.variant else _run_found(cell.folder))
    except (KeeptuneError, KeyError, TypeError) as error:
        return row | {"status": "missing", "message": f"{type(error).__name__}: {error}"}


def _run_found(folder: Path) -> dict[str, Any]:
    trained = read_json(folder / "trained" / "train.json")
    names = [entry["name"] for entry in read_json(folder / "recipe.json")["evaluate"]]
    records = _scores(folder / "evaluation", names, result_fingerprint(find_result(folder)))
    plan = folder / "plan" / "seconds.json"
    return {
        "seconds": {
            "plan": read_json(plan)["plan"] if plan.is_file() else None,
            "train": trained["seconds"],
            "evaluate": math.fsum(record["seconds"] for record in records),
        },
        "trained_parameters": trained["trained_parameters"],
        "benchmarks": [_benchmark(record["summary"]) for record in records],
    }


def _knob_found(folder: Path) -> dict[str, Any]:
    knob = read_json(folder / "knob.json")
    if knob["message"]:
        return {"status": "failed", "message": knob["message"]}
    trained = folder.parent.parent
    records = _scores(folder, knob["benchmarks"], result_fingerprint(find_result(trained)))
    seconds = {"plan": None, "train": None, "evaluate": math.fsum(record["seconds"] for record in records)}
    return {"seconds": seconds, "benchmarks": [_benchmark(record["summary"]) for record in records]}


def _scores(folder: Path, names: Iterable[str], weights: str) -> list[dict[str, Any]]:
    records = [read_json(folder / f"{name}.json") for name in names]
    for record in records:
        if record["weights"] != weights:
            raise ArtefactError(
                str(folder / f"{record['summary']['name']}.json"),
                got="scores of other weights than those that are there",
                wanted="scores of the cell's result",
                next_step="Start the comparison again; it does what is missing.",
            )
    return records


def _benchmark(summary: Mapping[str, Any]) -> dict[str, Any]:
    return {key: summary[key] for key in _BENCHMARK}


def with_axes(rows: Sequence[Mapping[str, Any]], axes: Axes) -> list[dict[str, Any]]:
    """Give rows their place on the axes.

    Args:
        rows: Rows with ``benchmarks``.
        axes: The axes.

    Returns:
        New rows with ``learned`` and ``forgotten``, None where there is none, and then ``why``.
    """
    found = []
    for row in rows:
        learned, forgotten = (
            learned_of(row["benchmarks"], axes.learned),
            forgotten_of(row["benchmarks"], axes.forgotten),
        )
        done = row["status"] == "done"
        why = (learned.why or forgotten.why) if done else ""
        placed = {"learned": learned.number, "forgotten": forgotten.number, "why": why}
        found.append({**row, **(placed if done else {"learned": None, "forgotten": None, "why": ""})})
    return found


def trade_off_of(rows: Sequence[Mapping[str, Any]], axes: Axes, options: Options | None = None) -> dict[str, Any]:
    """Make ``front.json`` of rows.

    Args:
        rows: From :func:`with_axes`.
        axes: The axes.
        options: What the recipe says.

    Returns:
        ``axes``, ``points``, ``fronts``, ``front``, ``hypervolume``, ``reference_point``, ``matched``, ``excluded``,
        ``notes`` and ``choice`` (None).
    """
    options = options or Options()
    points, excluded = points_of(rows)
    groups = families(points)
    reference = options.reference_point or reference_point(rows, axes, points)
    over_all = _names(points)
    fronts = {label: _names(members) for label, members in groups.items()}
    known = options.baseline or next((label for label in groups if label == "lora"), None)
    return {
        "units": {"learned": axes.learned.unit, "forgotten": axes.forgotten.unit},
        "axes": {"learned": list(axes.learned.names), "forgotten": list(axes.forgotten.names)},
        "points": [_described(point, point.name in over_all) for point in points],
        "fronts": fronts,
        "front": over_all,
        "hypervolume": {} if reference is None else hypervolumes(groups, reference),
        "reference_point": None if reference is None else list(reference),
        "matched": matched(groups, options.score, known),
        "excluded": excluded,
        "notes": _notes(points, excluded),
        "choice": None,
    }


def _names(points: Sequence[Point]) -> list[str]:
    kept = pareto([point.place for point in points])
    return [point.name for point, on in sorted(zip(points, kept, strict=True), key=lambda pair: pair[0].place) if on]


def _described(point: Point, on_front: bool) -> dict[str, Any]:
    return {
        "name": point.name,
        "label": point.label,
        **point.about,
        "of": point.of,
        "seeds": sorted(point.places),
        "runs": [point.cells[seed] for seed in sorted(point.cells)],
        "learned": asdict(point.learned),
        "forgotten": asdict(point.forgotten),
        "on_front": on_front,
    }


def _notes(points: Sequence[Point], excluded: Sequence[Mapping[str, str]]) -> list[str]:
    """Say what a reader of means should know: points with fewer seeds, and how many cells are left out."""
    most = max((len(point.places) for point in points), default=0)
    fewer = [f"{point.name} ({len(point.places)})" for point in points if len(point.places) < most]
    more = f" and {len(fewer) - _NAMED} more" if len(fewer) > _NAMED else ""
    notes = [f"with fewer than {most} seeds: {', '.join(fewer[:_NAMED])}{more}"] if fewer else []
    if excluded:
        count = "1 cell is" if len(excluded) == 1 else f"{len(excluded)} cells are"
        notes.append(f"{count} left out; `excluded` says why")
    if most == 1:
        notes.append("with one seed there are no intervals over seeds")
    return notes


def write_records(
    output: Path,
    cells: Sequence[Cell],
    *,
    base: str,
    command: str,
    recipe: Mapping[str, Any],
    options: Options | None = None,
    published: Sequence[Mapping[str, Any]] = (),
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read the cells and write ``runs.json``, ``runs.parquet`` and ``front.json``, each whole or not at all.

    Args:
        output: The comparison's folder.
        cells: Every run, finished or not, in the order to show them.
        base: The base model.
        command: What repeats the comparison.
        recipe: The recipe.
        options: What it says about axes and tables.
        published: A paper's scores to stand beside: ``label``, ``benchmark``, ``score``, ``source`` and ``note`` each.

    Returns:
        What ``runs.json`` and ``front.json`` hold; the latter's choice is None.

    Raises:
        RecipeError: The axes or the baseline that the recipe names do not exist.
        ArtefactError: The disk is full or cannot be written.
    """
    import pyarrow.parquet as pq

    options = options or Options()
    rows = [_finite(row_of(cell)) for cell in cells]
    benchmarks = _benchmarks(rows)
    sides = {b["role"] for b in benchmarks}
    if len(sides) == 2:
        axes = axes_of(benchmarks, options.learned, options.forgotten)
        rows = with_axes(rows, axes)
        trade_off = trade_off_of(rows, axes, options)
    else:  # nothing is scored yet, or one side alone, as in some published tables
        rows = [{**row, "learned": None, "forgotten": None, "why": ""} for row in rows]
        trade_off = no_trade_off(sides) | {"excluded": points_of(rows)[1] if not sides else []}
    record = {
        "base": base,
        "version": version("keeptune"),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command,
        "recipe": recipe,
        "benchmarks": benchmarks,
        "runs": rows,
        **({"published": list(published)} if published else {}),
    }
    table = io.BytesIO()
    pq.write_table(table_of(rows), table)
    write_json(output / CELLS, record)
    write_bytes(output / "runs.parquet", table.getvalue())
    write_json(output / FRONT, trade_off)
    return record, trade_off


def _benchmarks(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        for b in row["benchmarks"]:
            found.setdefault(b["name"], {key: b[key] for key in ("name", "role", "metric", "n")})
    return list(found.values())


def _finite(value: Any) -> Any:
    """Replace NaN and infinities, which JSON has not, by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list | tuple) else value


def read_runs(output: Path) -> dict[str, Any]:
    """Read ``runs.json``.

    Args:
        output: The comparison's folder.

    Returns:
        What it holds.

    Raises:
        ArtefactError: There is none, or it is damaged.
    """
    found: dict[str, Any] = read_json(output / CELLS)
    return found


def read_front(output: Path) -> dict[str, Any]:
    """Read ``front.json``.

    Args:
        output: The comparison's folder.

    Returns:
        What it holds.

    Raises:
        ArtefactError: There is none, or it is damaged.
    """
    found: dict[str, Any] = read_json(output / FRONT)
    return found
