"""The records of a comparison: runs to rows, rows to the trade-off, and both to files.

``runs.json`` and ``runs.parquet`` have a row per run, ``front.json`` what the rows mean. From rows to trade-off
everything is a pure function; only :func:`row_of` reads run folders and only :func:`write_records` writes.
"""

import datetime
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from keeptune.core.artefact import as_written, canonical_json, read_json, write_bytes, write_json
from keeptune.core.errors import ArtefactError, KeeptuneError, named
from keeptune.evaluation.results import BenchmarkResult, references_by_seed, trade_off
from keeptune.experiments.axes import SIDES, Axis, Value, axes_of, value_of
from keeptune.experiments.compare_section import CompareSection
from keeptune.experiments.front import SETTING, Point, as_json, families, pareto, points_of
from keeptune.experiments.matched import matched
from keeptune.experiments.plan_runs import RunSpec
from keeptune.experiments.posthoc_variants import VARIANTS, Variant
from keeptune.experiments.single_run import Outcome
from keeptune.pipeline.reporting import plan_seconds
from keeptune.pipeline.scoring import find_result, result_fingerprint

RUNS_FILE, FRONT = "runs.json", "front.json"
AGAIN = "Start the comparison again: what is missing or damaged is done again."
_BENCHMARK = ("name", "role", "metric", "n", "before", "after", "interval")
_TEXTS = ("name", "label", "of", "method", "status", "message", "folder")
_NUMBERS = ("seed", "trained_parameters", "learned", "forgotten", "K", "T", "KT")
_SAID = {"scale": "scaled", "pruned": "pruned"}
_SETTING = ("method", "settings", "learning_rate", "strength")


def row_of(spec: RunSpec, outcome: Outcome, variant: Variant | None = None) -> dict[str, Any]:
    """Reads the folder of a run, or of a post-hoc variant of its result, into a row of ``runs.json``, without its axes.

    Of a run that is done but whose scores are missing, or are of other weights, the status is ``"missing"``.
    """
    folder = spec.recipe.output if variant is None else spec.recipe.output / VARIANTS / variant.slug
    row: dict[str, Any] = {
        **{key: getattr(spec, key) for key in (*_SETTING, "seed", "x")},
        "name": spec.name if variant is None else f"{spec.name}/{variant.slug}",
        "label": spec.label if variant is None else f"{spec.label}, {_SAID[variant.kind]}",
        "variant": None if variant is None else variant.record,
        "of": None if variant is None else spec.label,
        "folder": str(folder),
        "status": outcome.status,
        "message": outcome.message,
        "seconds": {"plan": None, "train": None, "evaluate": None},
        "trained_parameters": None,
        "benchmarks": [],
    }
    if outcome.status != "done":
        return row
    try:
        with as_written(folder, again=AGAIN):
            if variant is None:
                return row | _run_scores(folder)
            head = read_json(folder / "variant.json")
            if head["message"]:
                return row | {"status": "failed", "message": head["message"]}
            return row | _scores(folder, head["benchmarks"], find_result(spec.recipe.output))
    except KeeptuneError as error:
        return row | {"status": "missing", "message": str(error)}


def _run_scores(folder: Path) -> dict[str, Any]:
    trained = read_json(folder / "trained" / "train.json")
    names = [entry["name"] for entry in read_json(folder / "recipe.json")["evaluate"]]
    scored = _scores(folder / "evaluation", names, find_result(folder))
    scored["seconds"] |= {"plan": plan_seconds(folder), "train": trained["seconds"]}
    return scored | {"trained_parameters": trained["trained_parameters"]}


def _scores(folder: Path, names: Iterable[str], result: Path) -> dict[str, Any]:
    records = [read_json(folder / f"{name}.json") for name in names]
    weights = result_fingerprint(result)
    for record in records:
        if record["weights"] != weights:
            raise ArtefactError(
                str(folder / f"{record['summary']['name']}.json"),
                got="scores of other weights than those that are there",
                wanted="scores of the run's result",
                next_step=AGAIN,
            )
    return {
        "seconds": {"plan": None, "train": None, "evaluate": math.fsum(record["seconds"] for record in records)},
        "benchmarks": [{key: record["summary"][key] for key in _BENCHMARK} for record in records],
    }


def with_relative_scores(rows: Sequence[Mapping[str, Any]], reference: Path | None = None) -> list[dict[str, Any]]:
    """Adds ``K``, ``T`` and ``KT`` (FARSS) to rows; T is relative to full fine-tuning of the same seed.

    Of several full fine-tunings the one that learned most counts: T is not flattered. ``reference`` is a run folder of
    one, for seeds that have none among the rows.
    """
    outside = None if reference is None else _results(_run_scores(reference))
    full = references_by_seed(
        (row["seed"], _results(row))
        for row in rows
        if row["method"] == "full" and row["status"] == "done" and not row["variant"]
    )
    scored = []
    for row in rows:
        done = row["status"] == "done"
        scores = trade_off(_results(row), full.get(row["seed"], outside)) if done else {}
        scored.append({**row, **{key: scores.get(key) for key in ("K", "T", "KT")}})
    return scored


def _results(row: Mapping[str, Any]) -> list[BenchmarkResult]:
    return [BenchmarkResult(**b, kl_to_base=None, groups={}, items=()) for b in row["benchmarks"]]


def with_axes(rows: Sequence[Mapping[str, Any]], axes: Mapping[str, Axis]) -> list[dict[str, Any]]:
    """Adds ``learned`` and ``forgotten`` to rows, with their item intervals, or ``why`` there are none."""
    placed = []
    for row in rows:
        scored = axes if row["status"] == "done" else {}
        values = dict.fromkeys(SIDES, Value(None)) | {
            s: value_of(row["benchmarks"], axis) for s, axis in scored.items()
        }
        numbers = {side: value.number for side, value in values.items()}
        ends = {f"{side}_interval": value.interval and list(value.interval) for side, value in values.items()}
        why = next((value.why for value in values.values() if value.why), "")
        placed.append({**row, **numbers, **ends, "why": why})
    return placed


def trade_off_of(
    rows: Sequence[Mapping[str, Any]], axes: Mapping[str, Axis], score: float | None = None, baseline: str | None = None
) -> dict[str, Any]:
    """Returns what ``front.json`` holds of rows with axes; its ``choice`` is None.

    ``score`` is where labels are matched, ``baseline`` the label that the others are compared with; None leaves them to
    the data, and takes ``lora`` where it is a label.
    """
    points, excluded = points_of(rows)
    groups = families(points)
    over_all = _names(points)
    described = [
        {"name": point.name, "label": point.label}
        | {key: point.rows[0][key] for key in (*SETTING, "of")}
        | {"seeds": list(point.places), "runs": [row["name"] for row in point.rows]}
        | {side: as_json(point.over_seeds(side)) for side in SIDES}
        | {"on_front": point.name in over_all}
        for point in points
    ]
    return {
        "units": {side: axis.unit for side, axis in axes.items()} or None,
        "axes": {side: list(axis.names) for side, axis in axes.items()} or None,
        "points": described,
        "fronts": {label: _names(members) for label, members in groups.items()},
        "front": over_all,
        "matched": matched(groups, score, baseline or next((label for label in groups if label == "lora"), None)),
        "excluded": excluded,
        "notes": _notes(points, excluded),
        "choice": None,
    }


def _names(points: Sequence[Point]) -> list[str]:
    kept = pareto([point.place for point in points])
    return [point.name for point, on in sorted(zip(points, kept, strict=True), key=lambda pair: pair[0].place) if on]


def _notes(points: Sequence[Point], excluded: Sequence[Mapping[str, str]]) -> list[str]:
    most = max((len(point.places) for point in points), default=0)
    fewer = [f"{point.name} ({len(point.places)})" for point in points if len(point.places) < most]
    notes = [f"with fewer than {most} seeds: {named(fewer, 5)}"] if fewer else []
    if excluded:
        count = "1 run is" if len(excluded) == 1 else f"{len(excluded)} runs are"
        notes.append(f"{count} left out; `excluded` says why")
    if most == 1:
        notes.append("with one seed, intervals are over items alone")
    return notes


def write_records(
    output: Path,
    rows: Sequence[Mapping[str, Any]],
    section: CompareSection,
    *,
    baseline: str | None = None,
    reference: Path | None = None,
    about: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Writes ``runs.json``, ``runs.parquet`` and ``front.json``, each whole or not at all, and returns both JSONs.

    Rows are from :func:`row_of`, of every run, finished or not, in the order to show them. The others are compared with
    the label ``baseline``, by default ``lora`` if it is one; ``reference`` is a run folder of full fine-tuning, for T;
    ``about`` are more keys of ``runs.json``.

    Raises:
        RecipeError: The axes or the baseline that the recipe names do not exist.
    """
    import pyarrow.parquet as pq

    rows = [_finite(row) for row in with_relative_scores(rows, reference)]
    named = {b["name"]: {key: b[key] for key in _BENCHMARK[:4]} for row in rows for b in row["benchmarks"]}
    benchmarks = list(named.values())
    lacking = set(SIDES.values()) - {b["role"] for b in benchmarks}
    axes = {} if lacking else axes_of(benchmarks, section.learned, section.forgotten)
    rows = with_axes(rows, axes)
    one_side = len(lacking) == 1  # as some published tables: told, and set against nothing
    front = trade_off_of([] if one_side else rows, axes, section.score, baseline)
    front["notes"] += [f"no trade-off: `evaluate` has no benchmark with role: {role}" for role in lacking if one_side]
    record = {
        "version": version("keeptune"),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        **(about or {}),
        "benchmarks": benchmarks,
        "runs": rows,
    }
    table = io.BytesIO()
    pq.write_table(table_of(rows), table)
    write_json(output / RUNS_FILE, record)
    write_bytes(output / "runs.parquet", table.getvalue())
    write_json(output / FRONT, front)
    return record, front


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list | tuple) else value


def table_of(rows: Sequence[Mapping[str, Any]]) -> Any:
    """Returns rows as a pyarrow table: one line a run, benchmarks as columns, settings and variant as JSON text."""
    import pyarrow as pa

    lines = []
    for row in rows:
        line = {key: row.get(key) for key in _TEXTS + _NUMBERS}
        line |= {key: None if row[key] is None else float(row[key]) for key in ("learning_rate", "strength")}
        line |= {key: None if row[key] is None else canonical_json(row[key]) for key in ("settings", "variant")}
        line |= {f"seconds.{stage}": seconds for stage, seconds in row["seconds"].items()}
        for b in row["benchmarks"]:
            low, high = b["interval"] or (None, None)
            scores = {"before": b["before"], "after": b["after"], "low": low, "high": high, "n": b["n"]}
            line |= {f"{b['name']}.{key}": value for key, value in scores.items()}
        lines.append(line)
    keys = dict.fromkeys(key for line in lines for key in line)
    return pa.table({key: pa.array([line.get(key) for line in lines]) for key in keys})
