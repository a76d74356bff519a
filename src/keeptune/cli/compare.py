"""The command that sets methods, rates, strengths and seeds side by side: compare."""

from __future__ import annotations

import shlex
import sys
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from keeptune.cli import dry_run as cli_dry
from keeptune.cli.options import Flops, RecipeFile, overrides_of, print_failed, say

__all__ = ["compare"]


def compare(
    context: typer.Context,
    recipe: RecipeFile,
    max_loss: Annotated[
        list[str] | None,
        typer.Option(help="Export the best result that loses at most this share, or benchmark=share, of what it knew."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the cells and what they would take; fetch and run nothing.")
    ] = False,
    flops: Flops = None,
) -> None:
    """Run methods x rates x strengths x seeds (the recipe's `compare` section). Started again, it goes on."""
    from keeptune.data import hub
    from keeptune.experiments.comparison.cells import load_comparison
    from keeptune.experiments.comparison.choice import parse_max_loss
    from keeptune.experiments.comparison.running import run_comparison

    limits = parse_max_loss(max_loss) if max_loss else None
    overrides = overrides_of(context)
    if dry_run:
        listed = load_comparison(recipe, overrides, fetch=hub.cached)
        (_list_cells if listed.section.search is None else _list_search)(listed)
        cli_dry.dry_run(recipe, overrides, flops)
        return
    loaded = load_comparison(recipe, overrides)
    found = run_comparison(loaded, shlex.join(["keeptune", *sys.argv[1:]]), limits)
    _show(found)
    say(f"report: {loaded.output / 'report.html'}")
    say(f"numbers: {loaded.output / 'runs.json'}, runs.parquet and front.json")
    choice = found.front["choice"]
    if choice:
        lost = ", ".join(f"{name} {loss:.3f}" for name, loss in choice["loss"].items())
        say(f"best: {choice['run']} in {choice['adapter']}: learned {choice['learned']:.3f}, lost {lost}")
    for name, message in found.failed.items():
        print_failed(name, message)
    if found.failed:
        raise typer.Exit(1)


def _list_cells(loaded: Any) -> None:
    from keeptune.experiments.comparison.cells import FOLDER, grid
    from keeptune.experiments.comparison.engine import works_of

    cells = grid(loaded)
    # Where no cell has a folder nothing is done, and what is done need not be compared with data that are elsewhere.
    started = (loaded.output / FOLDER).is_dir()
    missing = works_of(loaded, cells)[1] if started else {cell.name for cell in cells}
    table = Table("method", "learning rates", "strengths", "cells", "done", box=None, header_style="bold")
    for entry in loaded.entries:
        own = [cell for cell in cells if cell.label == entry.label]
        rates = ", ".join(f"{rate:g}" for rate in entry.rates)
        marks = ", ".join(variation.mark or "x1" for variation in entry.variations)
        done = sum(cell.name not in missing for cell in own)
        table.add_row(entry.label, rates, marks if len(entry.variations) > 1 else "", str(len(own)), str(done))
    Console().print(table)
    say(f"{len(cells)} cells below {loaded.output / 'cells'}, {len(cells) - len(missing)} done")


def _list_search(loaded: Any) -> None:
    from keeptune.experiments.comparison.space import spans_of
    from keeptune.experiments.comparison.study import read_journal

    table = Table("method", "learning rate", "strength", "trials so far", box=None, header_style="bold")
    ended = read_journal(loaded.output)
    for entry in loaded.entries:
        spans = {name.rpartition(".")[2]: span for name, span in spans_of(entry).items()}
        rate, strength = (str(spans.get(name, "")) for name in ("rate", "strength"))
        own = sum(trial.drawn["entry"] == entry.label for trial in ended)
        table.add_row(entry.label, rate or f"{entry.rates[0]:g}", strength, str(own))
    Console().print(table)
    others = len(loaded.section.seeds) - 1
    then = f", then the settings on the front with {others} more seeds each" if others else ""
    say(f"a search of {loaded.section.search.trials} trials below {loaded.output / 'cells'}{then}")
    say("what follows counts the listed settings; the search takes as many cells as it has trials")


def _show(found: Any) -> None:
    """Print what each label's points are worth: learned and forgotten at its best point, and at matched score."""
    front = found.front
    rows = {row["label"]: row for row in front["matched"]["rows"]}
    score = front["matched"]["score"]
    table = Table("method", "learned most", "forgotten there", box=None, header_style="bold")
    table.add_column("forgotten" if score is None else f"forgotten at {score:.3g}", justify="right")
    table.add_column("how")
    for label in rows or front["fronts"]:  # those that forget least at the same score first
        points = [point for point in front["points"] if point["label"] == label]
        best = max(points, key=lambda point: (point["learned"]["mean"], -point["forgotten"]["mean"]))
        row = rows.get(label, {})
        at = row.get("forgotten")
        table.add_row(
            label,
            _spread(best["learned"]),
            _spread(best["forgotten"]),
            "-" if at is None else _spread(at),
            str(row.get("how", "")),
        )
    Console().print(table)


def _spread(value: Any) -> str:
    text = f"{value['mean']:.3f}"
    return text if value.get("low") is None else f"{text} [{value['low']:.3f}, {value['high']:.3f}]"
