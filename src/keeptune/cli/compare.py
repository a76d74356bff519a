"""The command that compares methods, rates, strengths and seeds: compare; and what the commands of many runs share."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer import echo

from keeptune.cli import dry_run as cli_dry
from keeptune.cli.shared import AsJson, Flops, RecipeFile, overrides_of


def compare(
    context: typer.Context,
    recipe: RecipeFile,
    max_loss: Annotated[
        list[str] | None,
        typer.Option(help="Export the best result that loses at most this share, or benchmark=share, of what it knew."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List the runs and what they would take; fetch and run nothing.")
    ] = False,
    flops: Flops = None,
    as_json: AsJson = False,
) -> None:
    """Run methods x rates x strengths x seeds (the recipe's `compare` section). Started again, it goes on."""
    from keeptune.data import hub
    from keeptune.experiments.choice import parse_max_loss
    from keeptune.experiments.plan_runs import load_comparison

    limits = parse_max_loss(max_loss) if max_loss else None
    overrides = overrides_of(context)
    if dry_run or as_json:
        listed = load_comparison(recipe, overrides, fetch=hub.cached)
        if not as_json:
            _list_runs(listed)
        cli_dry.dry_run(recipe, overrides, flops, dry=dry_run, as_json=as_json)
        return
    run_and_show(load_comparison(recipe, overrides), limits)


def run_and_show(loaded: Any, limits: Any = None, show: Callable[[Any], None] | None = None) -> None:
    """Runs a comparison and prints its results; the exit code is 1 where a run failed.

    Args:
        loaded: The comparison.
        limits: How much may be lost, for the best result.
        show: Prints the table; None prints the trade-off.
    """
    from keeptune.experiments.run_comparison import run_comparison

    compared = run_comparison(loaded, shlex.join(["keeptune", *sys.argv[1:]]), limits)
    (show or _show_trade_off)(compared)
    echo(f"report: {loaded.records / 'report.html'}")
    echo(f"numbers: {loaded.records / 'runs.json'}, runs.parquet and front.json")
    if compared.figure is not None:
        echo(f"figure: {compared.figure}")
    choice = compared.front["choice"]
    if choice:
        lost = ", ".join(f"{name} {loss:.3f}" for name, loss in choice["loss"].items())
        echo(f"best: {choice['run']} in {choice['adapter']}: learned {choice['learned']:.3f}, lost {lost}")
    for name, message in compared.failed.items():
        echo(f"failed: {name}: {message}", err=True)
    if compared.failed:
        raise typer.Exit(1)


def _show_trade_off(compared: Any) -> None:
    """Print what each label learned and forgot at its best point, and at matched score."""
    front = compared.front
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
        last = "-" if at is None else interval_text(at)
        table.add_row(
            label, interval_text(best["learned"]), interval_text(best["forgotten"]), last, str(row.get("how", ""))
        )
    Console().print(table)


def interval_text(value: Any) -> str:
    """Returns a mean with its interval, of ``mean``, ``low`` and ``high``."""
    text = f"{value['mean']:.3f}"
    return text if value.get("low") is None else f"{text} [{value['low']:.3f}, {value['high']:.3f}]"


def _list_runs(loaded: Any) -> None:
    from keeptune.experiments.engine import tasks_of
    from keeptune.experiments.plan_runs import RUNS, list_runs

    folder = loaded.output / RUNS
    specs = list_runs(loaded)
    # Where no run has a folder nothing is done, and what is done need not be compared with data that are elsewhere.
    done = len(specs) - len(tasks_of(loaded, specs)[2]) if folder.is_dir() else 0
    echo(f"{len(specs)} runs below {folder}, {done} done")
