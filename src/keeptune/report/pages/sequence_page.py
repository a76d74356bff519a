"""The page of a sequence of stages: what was learned, what of it was kept, and what it did to the knowledge."""

import os
from pathlib import Path
from typing import Any

from keeptune.core.artefact import as_written, write_text
from keeptune.report.figures import write_figures
from keeptune.report.grids import Grid
from keeptune.report.pages.item_rows import lost_and_gained, read_items
from keeptune.report.pages.page import render, repeat
from keeptune.report.pages.run_tables import benchmark_tables
from keeptune.report.pages.sequence_charts import Record, course, lines, losses, matrices
from keeptune.report.records import as_report


def write_sequence(record: Record, path: str | os.PathLike[str]) -> None:
    """Writes ``sequence.json`` as one HTML file, and its figures as PNG and SVG into ``figures`` beside it.

    Raises:
        ArtefactError: The record lacks something, or a file cannot be written.
    """
    page = render_sequence(record)
    write_figures([*matrices(record), *lines(record), course(record)], Path(path).parent / "figures")
    write_text(Path(path), page)  # last: where it is, all is


@as_written("sequence.json", again="Run the sequence again; it makes the record anew from the stages that are there.")
def render_sequence(record: Record) -> str:
    """Returns the page, always the same of the same record; an ArtefactError names what the record lacks."""
    maps, over, progress, lost = matrices(record), lines(record), course(record), losses(record)
    commands = [("Serve the adapter", record["export"]["serve"])] if record["export"] else []
    recipes = [(f"Recipe of stage {name}", recipe) for name, recipe in record["recipes"].items()]
    return render(
        "sequence.html.j2",
        [*maps, *over, progress, lost],
        record["base"],
        _items(record),
        created=record["created"],
        version=record["version"],
        maps=maps,
        over=over,
        progress=progress,
        losses=lost,
        knowledge=knowledge(record),
        record=record,
        repeat=repeat(commands, recipes),
    )


def knowledge(record: Record) -> Grid | None:
    """Returns what the whole sequence did to the knowledge, a row with a bar for each benchmark."""
    known = zip(record["benchmarks"], record["scores"][0], record["scores"][-1], record["intervals"][-1], strict=True)
    items = [
        benchmark | {"before": before, "after": after, "interval": pair}
        for benchmark, before, after, pair in known
        if benchmark["role"] == "knowledge" and before is not None and after is not None
    ]
    run = dict.fromkeys(("K", "T", "KT", "export_gap")) | {"name": "the last stage", "seed": 0, "adapter": ""}
    tables = benchmark_tables(as_report({"base": "", "methods": [run | {"benchmarks": items}]}))
    rows = tuple((kind.name, *grid.rows[0][1:]) for kind, _, grid in tables)
    return Grid(("benchmark", "before → after", "change"), rows) if rows else None


def _items(record: Record) -> dict[str, Any] | None:
    """Returns the items of each stage, which are beside its adapter."""
    results = []
    for stage in record["stages"]:
        row = {"name": f"after {stage['name']}", "seed": stage["seed"], "folder": Path(stage["adapter"]).parent}
        results += read_items(row | {"benchmarks": record["benchmarks"]})
    return lost_and_gained(results) if results else None
