"""Commands that compare runs and look into what training did: sweep, layers, change, curvature, energy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

__all__ = ["OVERRIDES", "RecipeFile", "change", "curvature", "energy", "layers", "say", "show_comparison", "sweep"]

OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}
RecipeFile = Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)]


def sweep(
    context: typer.Context,
    recipe: RecipeFile,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and list the points; run nothing.")] = False,
) -> None:
    """Run a recipe at several points and seeds (its keys `sweep` and `seeds`), and join them into one report."""
    from keeptune.experiments.sweep import load_sweep, run_sweep
    from keeptune.recipe.schema import parse_overrides

    loaded = load_sweep(recipe, parse_overrides(context.args))
    if dry_run:
        _list_points(loaded)
        return
    _show_sweep(loaded, run_sweep(loaded))


def layers(
    context: typer.Context,
    recipe: RecipeFile,
    study: Annotated[str, typer.Option(help="single: one at a time; bottom or top: the lowest or highest few.")],
    numbers: Annotated[str | None, typer.Option(help="How many layers, such as 2,4,6; for bottom and top.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check and list the runs; run nothing.")] = False,
) -> None:
    """Study what tuning each layer gains and costs (L2-LoRA Fig. 4, Tables 5 and 6), each cell a run of one recipe."""
    from keeptune.experiments.layers import load_study
    from keeptune.experiments.sweep import run_sweep
    from keeptune.recipe.schema import parse_overrides

    loaded = load_study(recipe, study, parse_overrides(context.args), _whole_numbers("--numbers", numbers))
    if dry_run:
        _list_points(loaded)
        return
    _show_sweep(loaded, run_sweep(loaded))


def energy(
    model: Annotated[str, typer.Argument(help="atlas, a folder or a hub id.", show_default=False)],
    top: Annotated[int, typer.Option(min=1, help="How many singular values.")] = 5,
    output: Annotated[Path, typer.Option(help="The figure; the numbers go beside it as .json.")] = Path("energy.png"),
    targets: Annotated[str | None, typer.Option(help="Roles, such as q_proj,down_proj; default: all.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Show how much of each weight's energy its largest singular values hold, layer by layer (FARSS Fig. 1)."""
    from keeptune.report.grid import print_grid
    from keeptune.studies.energy import energy as measure_energy

    found = measure_energy(model, output, top=top, roles=_roles(targets), device=device)
    cells: dict[tuple[int | None, str], list[str]] = {}
    for row in found["rows"]:
        text = "–" if row["energy"] is None else f"{row['energy']:.3f}"
        cells.setdefault((row["layer"], row["role"]), []).append(text)
    cells |= {(int(layer), "mean"): [f"{value:.3f}"] for layer, value in found["mean"].items()}
    print_grid(cells, Console())
    say(f"share of the squared singular values in the top {top}")
    say(f"figure: {output}, numbers: {output.with_suffix('.json')}")


def change(
    trained: Annotated[list[str], typer.Argument(help="Adapter folders, run folders or models.", show_default=False)],
    base: Annotated[str | None, typer.Option(help="The base; default: what each names.")] = None,
    output: Annotated[Path, typer.Option(help="The figure; the numbers go beside it as .json.")] = Path("change.png"),
    targets: Annotated[str | None, typer.Option(help="Roles, such as q_proj,down_proj; default: all.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Show how far training moved each weight, by layer and module, of one or more adapters (L2-LoRA Fig. 6)."""
    from keeptune.report.change import print_change
    from keeptune.studies.change import change as measure_change

    found = measure_change(trained, output, base=base, roles=_roles(targets), device=device)
    print_change(found, Console())
    say(f"figure: {output}, numbers: {output.with_suffix('.json')}")


def curvature(
    run: Annotated[Path, typer.Argument(help="A run whose plan holds curvature (lalora).", show_default=False)],
    others: Annotated[list[str] | None, typer.Argument(help="Other runs or adapters on the same base.")] = None,
    base: Annotated[str | None, typer.Option(help="The base; default: what the run names.")] = None,
    output: Annotated[Path, typer.Option(help="The figure; the numbers go beside it as .json.")] = Path(
        "curvature.png"
    ),
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
) -> None:
    """Show where updates go against the curvature of the knowledge, a run's and others' (after LaLoRA Fig. 3a)."""
    from keeptune.report.curvature import print_curvature
    from keeptune.studies.curvature import curvature as measure_curvature

    print_curvature(measure_curvature(run, others or [], output, base=base, device=device), Console())
    say(f"figure: {output}, numbers: {output.with_suffix('.json')}")


def say(text: str) -> None:
    """Print a line as it is.

    Args:
        text: The line.
    """
    Console(soft_wrap=True, highlight=False).print(text, markup=False)


def show_comparison(report: dict[str, Any]) -> None:
    """Print the table of a report.

    Args:
        report: As in ``report.json``.
    """
    from keeptune.report.tables import print_comparison

    print_comparison(report, Console())


def _list_points(loaded: Any) -> None:
    from keeptune.report.stages import print_points

    print_points([(p.name, p.x, p.settings, list(p.recipes)) for p in loaded.points], Console())
    runs = [recipe.output for point in loaded.points for recipe in point.recipes.values()]
    say(f"{len(runs)} runs below {runs[0].parent}")


def _show_sweep(loaded: Any, swept: Any) -> None:
    from keeptune.report.benefit import print_benefits
    from keeptune.report.studies import print_study

    if swept.report is not None:
        if "study" in swept.record:
            print_study(swept.record, Console())
        else:
            show_comparison(swept.report)
        if "benefit" in swept.record:
            print_benefits(swept.record, Console())
        say(f"report: {loaded.output / 'report.html'}")
        say(f"numbers: {loaded.output / loaded.name}.json")
    if swept.figure:
        say(f"figure: {loaded.output / loaded.name}.png")
    for folder, message in swept.failed.items():
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"failed: {folder}: {message}", markup=False)
    if swept.failed:
        raise typer.Exit(1)


def _roles(text: str | None) -> list[str] | None:
    return None if text is None else [role.strip() for role in text.strip("[] ").split(",")]


def _whole_numbers(option: str, text: str | None) -> list[int] | None:
    from keeptune.core.errors import RecipeError

    if text is None:
        return None
    parts = [part.strip() for part in text.strip("[] ").split(",")]
    if not all(part.isdecimal() for part in parts):
        raise RecipeError(option, got=text, wanted="whole numbers", next_step=f"Example: {option} 2,4,6")
    return [int(part) for part in parts]
