"""The page of a comparison: every setting, the fronts, what each label forgets at the same task score, every run."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keeptune.core.errors import ArtefactError
from keeptune.report.bars import Bar, bar
from keeptune.report.comparison_charts import Scales, cost, fronts, hypervolumes, labels_of, setting_rows
from keeptune.report.comparison_figures import write_figures
from keeptune.report.details import Grid
from keeptune.report.items import lost_and_gained, read_items
from keeptune.report.page import render, write_page
from keeptune.report.repeat import repeat
from keeptune.report.wording import listing, number

__all__ = ["render_comparison", "write_comparison"]

_MOST_NAMED = 6
Front = Mapping[str, Any]


def write_comparison(cells: Mapping[str, Any], front: Front, path: str | os.PathLike[str]) -> None:
    """Write a comparison as one self-contained HTML file, and its figures as PNG and SVG into ``figures`` beside it.

    Args:
        cells: As in ``runs.json``.
        front: As in ``front.json``.
        path: The file; its folder must exist.

    Raises:
        ArtefactError: A record lacks a key, or a file cannot be written.
    """
    write_page(render_comparison(cells, front), path)
    write_figures(cells, front, Path(path).parent / "figures")


def render_comparison(cells: Mapping[str, Any], front: Front) -> str:
    """Make the page.

    Args:
        cells: As in ``runs.json``. With ``published``, a list of ``label``, ``benchmark`` and ``score`` (and perhaps
            ``source`` and ``note``), these numbers stand beside ours.
        front: As in ``front.json``.

    Returns:
        The HTML.

    Raises:
        ArtefactError: A record lacks a key.
    """
    try:
        return _render(cells, front)
    except (KeyError, TypeError) as error:
        raise ArtefactError(
            "runs.json or front.json",
            got=f"{type(error).__name__}: {error}",
            wanted="the records that keeptune compare wrote",
            next_step="Run `keeptune compare` again; it makes them anew from the cells that are there.",
        ) from error


def _render(cells: Mapping[str, Any], front: Front) -> str:
    rows = cells["runs"]
    charts = {"tradeoff": fronts(rows, front, base_score(rows, front)), "hypervolume": hypervolumes(rows, front)}
    matched = matched_rows(cells, front)
    found = _items(rows, front)
    recipe = cells.get("recipe")
    recipes = [("Recipe", recipe)] if recipe else []
    return render(
        "comparison.html.j2",
        [chart for chart in charts.values() if chart is not None],
        {"items": found["rows"]} if found else {},
        **charts,
        base=cells["base"],
        base_name=Path(str(cells["base"])).name or cells["base"],
        created=cells.get("created"),
        version=cells.get("version"),
        said=sentences(cells, front),
        score=front["matched"].get("score"),
        baseline=front["matched"].get("baseline"),
        matched=matched,
        unit=Scales(front).unit,
        choice=_choice(front),
        notes=front.get("notes") or [],
        failures=failures(cells, front),
        everything=every_run(cells),
        published=published(cells, front),
        found=found,
        repeat=repeat([("Do it again", str(cells["command"]))] if cells.get("command") else [], recipes),
        counts=_counts(cells, front),
    )


def base_score(rows: Sequence[Mapping[str, Any]], front: Front) -> float | None:
    """Read the base's own score on the axis of learning.

    Args:
        rows: Rows of ``runs.json``.
        front: As in ``front.json``.

    Returns:
        The mean over the axis' benchmarks; None where no cell has them all.
    """
    axes = front.get("axes") or {}
    for row in rows:
        before = {b["name"]: b["before"] for b in row["benchmarks"] if b["before"] is not None}
        names = axes.get("learned") or [b["name"] for b in row["benchmarks"] if b["role"] == "task"]
        if names and all(name in before for name in names):
            sign = -1.0 if (front.get("units") or {}).get("learned") == "nats" else 1.0
            return sign * math.fsum(before[name] for name in names) / len(names)
    return None


def sentences(cells: Mapping[str, Any], front: Front) -> list[str]:
    """Say what the comparison shows, and no more than its intervals support.

    Args:
        cells: As in ``runs.json``.
        front: As in ``front.json``.

    Returns:
        Sentences; what is clearly different from the baseline has a paired interval that excludes zero.
    """
    scales, table = Scales(front), front["matched"]
    reached = [row for row in table["rows"] if row["forgotten"] is not None]
    if not table["rows"]:
        return ["No label has finished runs to compare."]
    if not reached:
        return [f"No label reaches the task score {number(table['score'])} with every seed."]
    best = min(reached, key=lambda row: float(row["forgotten"]["mean"]))
    lost = f"{scales.spread(best['forgotten'])} {scales.unit}"
    said = [f"Where the task score is {number(table['score'])}, {best['label']} forgets least: {lost}."]
    baseline = table.get("baseline")
    own = next((row for row in reached if row["label"] == baseline), None)
    if baseline is not None and own is None:
        said.append(f"{baseline}, the baseline, does not reach this score.")
    if own is not None:
        said.append(f"{baseline}, the baseline, forgets {scales.spread(own['forgotten'])} there.")
        said += _against(reached, str(baseline))
    missed = [row["label"] for row in table["rows"] if row["forgotten"] is None]
    if missed:
        said.append(f"{_some(missed)} {'does' if len(missed) == 1 else 'do'} not reach it with every seed.")
    return said


def _against(reached: Sequence[Mapping[str, Any]], baseline: str) -> list[str]:
    less: list[str] = []
    more: list[str] = []
    same: list[str] = []
    unknown: list[str] = []
    for row in reached:
        if row["label"] == baseline:
            continue
        found = row.get("difference")
        if not found or found.get("low") is None or found.get("high") is None:
            unknown.append(row["label"])
        else:
            (less if found["high"] < 0 else more if found["low"] > 0 else same).append(row["label"])
    said = [
        (less, f"Clearly less than {baseline} (paired over seeds, 95%):"),
        (more, "Clearly more:"),
        (same, "No clear difference:"),
        (unknown, "No interval, for want of seeds:"),
    ]
    return [f"{words} {_some(labels)}." for labels, words in said if labels]


def _some(names: Sequence[str]) -> str:
    """List labels, quoting those that hold a comma."""
    labels = [f"“{name}”" if "," in name else name for name in names]
    if len(labels) <= _MOST_NAMED:
        return listing(labels)
    return f"{', '.join(labels[:_MOST_NAMED])} and {len(labels) - _MOST_NAMED} more"


@dataclass(frozen=True)
class MatchedRow:
    """A label at the matched task score."""

    label: str
    index: int
    forgotten: str
    how: str
    difference: str
    bar: Bar | None
    points: str


def matched_rows(cells: Mapping[str, Any], front: Front) -> list[MatchedRow]:
    """Print the table at matched task score; bars to the right forget less than the baseline.

    Args:
        cells: As in ``runs.json``.
        front: As in ``front.json``.

    Returns:
        A row for each label.
    """
    scales, numbered = Scales(front), labels_of(cells["runs"], front)
    rows = front["matched"]["rows"]
    found = [row.get("difference") or {} for row in rows]
    reach = [abs(d[key]) for d in found for key in ("mean", "low", "high") if d.get(key) is not None]
    top = max(reach, default=1.0) or 1.0
    made = []
    for row, difference in zip(rows, found, strict=True):
        label = str(row["label"])
        mean = difference.get("mean")
        ends = [math.nan if difference.get(key) is None else -float(difference[key]) for key in ("high", "low")]
        strip = None if mean is None else bar(-mean, ends[0], ends[1], top)
        told = scales.spread(difference, signed=True) if difference else "–"
        names = ", ".join(map(str, row.get("points") or []))
        index = numbered.get(label, 0)
        made.append(MatchedRow(label, index, scales.spread(row["forgotten"]), str(row["how"]), told, strip, names))
    return made


@dataclass(frozen=True)
class TableCell:
    """A cell of a table that can be sorted: its text, and the number to sort by if it is one."""

    text: str
    key: float | None = None
    wide: bool = False


@dataclass(frozen=True)
class SortedTable:
    """A table that can be sorted and searched."""

    heads: tuple[str, ...]
    rows: tuple[tuple[TableCell, ...], ...]


def every_run(cells: Mapping[str, Any]) -> SortedTable:
    """Tabulate all cells.

    Args:
        cells: As in ``runs.json``.

    Returns:
        A row for each cell, with every benchmark after training.
    """
    names = [b["name"] for b in cells["benchmarks"]]
    heads = (
        "run",
        "label",
        "rate",
        "strength",
        "seed",
        "status",
        "learned",
        "forgotten",
        *names,
        "trained",
        "setting",
    )
    rows: list[tuple[TableCell, ...]] = []
    for row in cells["runs"]:
        after = {b["name"]: b["after"] for b in row["benchmarks"]}
        setting = [f"{key} {value}" for key, value in setting_rows(row)[4:]]
        numbers = [row.get("learning_rate"), row.get("strength"), row["seed"]]
        scores = [row.get("learned"), row.get("forgotten"), *(after.get(name) for name in names)]
        rows.append(
            (
                TableCell(str(row["name"])),
                TableCell(str(row["label"])),
                *(TableCell("–" if n is None else f"{n:g}", n) for n in numbers),
                TableCell(str(row["status"]) + (f": {row['message']}" if row.get("message") else ""), wide=True),
                *(TableCell(number(n), n) for n in scores),
                TableCell(cost(row), (row.get("seconds") or {}).get("train")),
                TableCell("; ".join(setting) or "–", wide=True),
            )
        )
    return SortedTable(heads, tuple(rows))


def failures(cells: Mapping[str, Any], front: Front) -> list[tuple[str, str, str]]:
    """List the cells that failed, are missing, or are left out of the front, with the reason.

    Args:
        cells: As in ``runs.json``.
        front: As in ``front.json``.

    Returns:
        Name, what happened, and why.
    """
    found = {
        row["name"]: (str(row["name"]), str(row["status"]), str(row.get("message") or "no reason is known"))
        for row in cells["runs"]
        if row["status"] != "done"
    }
    for entry in front.get("excluded") or []:
        found.setdefault(entry["run"], (str(entry["run"]), "left out", str(entry["why"])))
    return list(found.values())


def published(cells: Mapping[str, Any], front: Front) -> Grid | None:
    """Put published numbers beside ours: of each label the setting that learned most.

    Args:
        cells: As in ``runs.json``.
        front: As in ``front.json``.

    Returns:
        A row for each published number; None where there is none.
    """
    entries = cells.get("published")
    if not entries:
        return None
    rows = []
    for entry in entries:
        label, name = str(entry["label"]), str(entry["benchmark"])
        ours = _ours(cells["runs"], front, label, name)
        source = " ".join(str(entry[key]) for key in ("source", "note") if entry.get(key))
        rows.append((label, name, number(entry["score"]), number(ours), source or "–"))
    return Grid(("label", "benchmark", "published", "ours", "source"), tuple(rows))


def _ours(rows: Sequence[Mapping[str, Any]], front: Front, label: str, name: str) -> float | None:
    members = [point for point in front["points"] if point["label"] == label]
    if not members:
        return None
    best = max(members, key=lambda point: float(point["learned"]["mean"]))
    of_point = set(best.get("runs") or [f"{best['name']}-seed{seed}" for seed in best["seeds"]])
    scores = [b["after"] for row in rows if row["name"] in of_point for b in row["benchmarks"] if b["name"] == name]
    good = [score for score in scores if score is not None]
    return math.fsum(good) / len(good) if good else None


def _choice(front: Front) -> list[tuple[str, str]]:
    """Tell what was chosen: names and values; losses are in the unit of each benchmark, shares or nats per token."""
    chosen = front.get("choice")
    if not chosen:
        return []
    over = "upper end of the interval" if chosen.get("estimate") == "upper" else "mean over seeds"
    rows = [
        ("may lose", _by_benchmark(chosen["max_loss"])),
        ("setting", chosen.get("point")),
        (f"loses, {over}", _by_benchmark(chosen.get("loss"))),
        ("task score", _by_benchmark(chosen.get("learned"))),
        ("its run", chosen["run"]),
        ("the run loses", _by_benchmark(chosen.get("run_loss"))),
        ("the run's task score", _by_benchmark(chosen.get("run_learned"))),
        ("without a limit", ", ".join(chosen.get("unbound") or []) or None),
        ("adapter", chosen.get("adapter")),
    ]
    return [(name, str(value)) for name, value in rows if value is not None]


def _by_benchmark(found: Mapping[str, float] | float | None) -> str | None:
    if isinstance(found, Mapping):
        return ", ".join(f"{name} {number(value)}" for name, value in found.items()) or None
    return None if found is None else number(found)


def _counts(cells: Mapping[str, Any], front: Front) -> str:
    rows = cells["runs"]
    states = [row["status"] for row in rows]
    labels, seeds = {row["label"] for row in rows}, {row["seed"] for row in rows}
    other = [f"{states.count(state)} {state}" for state in ("failed", "missing") if state in states]
    ending = f" ({', '.join(other)})" if other else ""
    counted = f"{len(labels)} labels, {len(front['points'])} settings, {len(seeds)} seed{'s' * (len(seeds) > 1)}"
    return f"{counted}; {states.count('done')} of {len(rows)} runs finished{ending}"


def _items(rows: Sequence[Mapping[str, Any]], front: Front) -> dict[str, Any] | None:
    """Read the items of the settings on the front, of each its first trained cell."""
    chosen = []
    for name in front["front"]:
        point = next((p for p in front["points"] if p["name"] == name), None)
        cells = [] if point is None else point.get("runs") or []
        row = next((r for r in rows if cells and r["name"] == cells[0] and not r.get("variant")), None)
        chosen += [] if row is None else [row]
    results = [result for row in chosen for result in read_items(row)]
    return lost_and_gained(results) if results else None
