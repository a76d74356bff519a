"""Commands that run one recipe at several points: sweep, layers."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

from keeptune.cli.options import RecipeFile, overrides_of, print_failed, print_report, say, whole_numbers_in

__all__ = ["layers", "sweep"]


def sweep(
    context: typer.Context,
    recipe: RecipeFile,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and list the points; run nothing.")] = False,
) -> None:
    """Run a recipe at several points and seeds (its keys `sweep` and `seeds`), and join them into one report."""
    from keeptune.experiments.sweep import load_sweep

    _run_or_list(load_sweep(recipe, overrides_of(context)), dry_run)


def layers(
    context: typer.Context,
    recipe: RecipeFile,
    study: Annotated[str, typer.Option(help="single: one at a time; bottom or top: the lowest or highest few.")],
    numbers: Annotated[str | None, typer.Option(help="How many layers, such as 2,4,6; for bottom and top.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and list the runs; run nothing.")] = False,
) -> None:
    """Study what tuning each layer gains and costs (L2-LoRA Fig. 4, Tables 5 and 6), by runs of one recipe."""
    from keeptune.experiments.layers import load_study

    _run_or_list(load_study(recipe, study, overrides_of(context), whole_numbers_in("--numbers", numbers)), dry_run)


def _run_or_list(loaded: Any, dry_run: bool) -> None:
    from keeptune.experiments.sweep import run_sweep
    from keeptune.report.tables.plan_tables import print_points

    if not dry_run:
        _show(loaded, run_sweep(loaded))
        return
    print_points([(p.name, p.x, p.settings, list(p.recipes)) for p in loaded.points], Console())
    runs = [recipe.output for point in loaded.points for recipe in point.recipes.values()]
    say(f"{len(runs)} runs below {runs[0].parent}")


def _show(loaded: Any, swept: Any) -> None:
    from keeptune.report.tables.analyses import print_benefits, print_study

    if swept.report is not None:
        if "study" in swept.record:
            print_study(swept.record, Console())
            say(f"report: {loaded.output / 'report.html'}")
        else:
            print_report(swept.report, loaded.output)
        if "benefit" in swept.record:
            print_benefits(swept.record, Console())
        say(f"numbers: {loaded.output / loaded.name}.json")
    if swept.figure:
        say(f"figure: {loaded.output / loaded.name}.png")
    for folder, message in swept.failed.items():
        print_failed(folder, message)
    if swept.failed:
        raise typer.Exit(1)
