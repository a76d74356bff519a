"""The page of a comparison: every setting, the fronts, what each label forgets at the same task score, every run."""

import math
import os
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, Final

from keeptune.core.artefact import as_written, write_text
from keeptune.core.intervals import mean_of_seeds
from keeptune.report.figures import write_figures
from keeptune.report.grids import bar
from keeptune.report.numbers import ends, listing, number
from keeptune.report.pages.comparison_charts import Scales, cost, fronts, labels_of, setting_rows
from keeptune.report.pages.item_rows import lost_and_gained, read_items
from keeptune.report.pages.page import render, repeat

_MOST_NAMED: Final = 6
Front = Mapping[str, Any]


def write_comparison(runs: Mapping[str, Any], front: Front, path: str | os.PathLike[str]) -> None:
    """Writes ``runs.json`` and ``front.json`` as one HTML file, and figures as PNG and SVG into ``figures`` beside it.

    Raises:
        ArtefactError: A record lacks something, or a file cannot be written.
    """
    write_text(Path(path), render_comparison(runs, front))
    chart = fronts(runs["runs"], front, base_score(runs["runs"], front))
    write_figures([chart], Path(path).parent / "figures")


@as_written(
    "runs.json or front.json",
    again="Run `keeptune compare` again; it makes them anew from the runs that are there.",
)
def render_comparison(runs: Mapping[str, Any], front: Front) -> str:
    """Returns the page, always the same of the same records; an ArtefactError names what a record lacks."""
    rows = runs["runs"]
    chart = fronts(rows, front, base_score(rows, front))
    states, labels, seeds = (list(map(itemgetter(key), rows)) for key in ("status", "label", "seed"))
    other = ", ".join(f"{states.count(state)} {state}" for state in ("failed", "missing") if state in states)
    differences = [row["difference"] for row in front["matched"]["rows"] if row["difference"]]
    reach = [abs(own[key]) for own in differences for key in ("mean", "low", "high") if own[key] is not None]
    several = "s" * (len(set(seeds)) > 1)
    counted = f"{len(set(labels))} labels, {len(front['points'])} settings, {len(set(seeds))} seed{several}"
    return render(
        "comparison.html.j2",
        [chart],
        runs["base"],
        _items(rows, front),
        tradeoff=chart,
        created=runs["created"],
        version=runs["version"],
        said=sentences(front),
        score=front["matched"]["score"],
        baseline=front["matched"]["baseline"],
        matched=front["matched"]["rows"],
        reach=max(reach, default=1.0) or 1.0,
        scales=Scales(front),
        numbered=labels_of(rows),
        bar=bar,
        ends=ends,
        choice=front["choice"],
        notes=front["notes"],
        runs=rows,
        names=[b["name"] for b in runs["benchmarks"]],
        excluded=front["excluded"],
        relative=[key for key in ("K", "T", "KT") if any(row[key] is not None for row in rows)],
        setting_rows=setting_rows,
        cost=cost,
        published=published(runs, front),
        repeat=repeat([("Do it again", runs["command"])], [("Recipe", runs["recipe"])]),
        counts=f"{counted}; {states.count('done')} of {len(rows)} runs finished{f' ({other})' if other else ''}",
    )


def base_score(rows: Sequence[Mapping[str, Any]], front: Front) -> float | None:
    """Returns the base's own score on the axis of learning; None where no run has it."""
    names = front["axes"]["learned"] if front["axes"] else ()
    for row in rows if names else ():
        before = {b["name"]: b["before"] for b in row["benchmarks"] if b["before"] is not None}
        if all(name in before for name in names):
            sign = -1.0 if front["units"]["learned"] == "nats" else 1.0
            return sign * math.fsum(before[name] for name in names) / len(names)
    return None


def sentences(front: Front) -> list[str]:
    """Returns what the comparison shows, and no more than its intervals support."""
    scales, table = Scales(front), front["matched"]
    reached = [row for row in table["rows"] if row["forgotten"] is not None]
    if not table["rows"]:
        return ["No label has finished runs to compare."]
    if not reached:
        return [f"No label reaches the task score {number(table['score'])} with every seed."]
    best = min(reached, key=lambda row: float(row["forgotten"]["mean"]))
    lost = f"{scales.spread(best['forgotten'])} {scales.unit}"
    said = [f"Where the task score is {number(table['score'])}, {best['label']} forgets least: {lost}."]
    baseline = table["baseline"]
    own = next((row for row in reached if row["label"] == baseline), None)
    if baseline is not None and own is None:
        said.append(f"{baseline}, the baseline, does not reach this score.")
    if own is not None:
        said.append(f"{baseline}, the baseline, forgets {scales.spread(own['forgotten'])} there.")
        groups: dict[str, list[str]] = {
            f"Clearly less than {baseline} (paired over seeds, 95%):": [],
            "Clearly more:": [],
            "No clear difference:": [],
            "No interval, for want of seeds:": [],
        }
        less, more, same, unknown = groups.values()
        for row in (row for row in reached if row is not own):
            low, high = ends(row["difference"])
            (unknown if math.isnan(low) else less if high < 0 else more if low > 0 else same).append(row["label"])
        said += [f"{words} {_some(labels)}." for words, labels in groups.items() if labels]
    missed = [row["label"] for row in table["rows"] if row["forgotten"] is None]
    if missed:
        said.append(f"{_some(missed)} {'does' if len(missed) == 1 else 'do'} not reach it with every seed.")
    return said


def _some(names: Sequence[str]) -> str:
    """Returns a list of labels, quoting those that hold a comma."""
    labels = [f"“{name}”" if "," in name else name for name in names]
    if len(labels) <= _MOST_NAMED:
        return listing(labels)
    return f"{', '.join(labels[:_MOST_NAMED])} and {len(labels) - _MOST_NAMED} more"


def published(runs: Mapping[str, Any], front: Front) -> list[tuple[Mapping[str, Any], float | None]]:
    """Returns published numbers with ours, of each label those of the setting that learned most."""
    rows = []
    for entry in runs.get("published", ()):
        members = [point for point in front["points"] if point["label"] == entry["label"]]
        best = max(members, key=lambda point: point["learned"]["mean"], default={"runs": ()})
        own = [b for row in runs["runs"] if row["name"] in best["runs"] for b in row["benchmarks"]]
        ours = mean_of_seeds([b["after"] for b in own if b["name"] == entry["benchmark"] and b["after"] is not None])
        rows.append((entry, ours.mean if ours else None))
    return rows


def _items(rows: Sequence[Mapping[str, Any]], front: Front) -> dict[str, Any] | None:
    """Returns the items of the settings on the front, of each its first trained run."""
    points = {point["name"]: point for point in front["points"]}
    by_name = {row["name"]: row for row in rows if not row["variant"]}
    firsts = [points[name]["runs"][0] for name in front["front"]]
    results = [result for name in firsts if name in by_name for result in read_items(by_name[name])]
    return lost_and_gained(results) if results else None
