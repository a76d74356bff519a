"""Commands that run one recipe at several points: sweep, layers."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from typer import echo

from keeptune.cli.compare import run_and_show
from keeptune.cli.shared import RecipeFile, numbers_in, overrides_of


def sweep(
    context: typer.Context,
    recipe: RecipeFile,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and list the points; run nothing.")] = False,
) -> None:
    """Run a recipe at several points and seeds (its keys `sweep` and `seeds`), and compare them on one page."""
    from keeptune.experiments.plan_runs import load_sweep

    _run_or_list(load_sweep(recipe, overrides_of(context)), dry_run)


def layers(
    context: typer.Context,
    recipe: RecipeFile,
    study: Annotated[str, typer.Option(help="single: one at a time; bottom or top: the lowest or highest few.")],
    numbers: Annotated[str | None, typer.Option(help="How many layers, such as 2,4,6; for bottom and top.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and list the runs; run nothing.")] = False,
) -> None:
    """Study what tuning each layer gains and costs (L2-LoRA Fig. 4, Tables 5 and 6), as runs of one recipe."""
    from keeptune.experiments.layer_studies import load_layer_study

    counts = numbers_in("--numbers", numbers, int, "2,4,6") or None
    _run_or_list(load_layer_study(recipe, study, overrides_of(context), counts), dry_run)


def _run_or_list(loaded: Any, dry_run: bool) -> None:
    from keeptune.experiments.plan_runs import check_runs, list_runs
    from keeptune.report.tables.plan_tables import print_points

    if not dry_run:
        run_and_show(loaded, show=_show)
        return
    specs = list_runs(loaded)
    check_runs(loaded, specs)
    print_points([(e.label, e.x, e.settings, loaded.section.seeds) for e in loaded.entries], Console())
    echo(f"{len(specs)} runs below {loaded.output / 'runs'}")


def _show(compared: Any) -> None:
    """Print the points of a sweep: scores after training, K, T and KT."""
    from keeptune.report.tables.analyses import print_benefits
    from keeptune.report.tables.comparison_table import print_comparison

    series = compared.series
    if not series["rows"]:  # every run failed
        return
    runs = [row | {"label": row["name"], "adapter": "", "export_gap": None} for row in series["rows"]]
    print_comparison({"base": "", "methods": runs}, Console())
    if "benefit" in series:
        print_benefits(series, Console())
