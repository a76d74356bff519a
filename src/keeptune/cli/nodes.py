"""Commands that look at nodes of MLPs: suppress, overlap (LoKI)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from keeptune.cli.studies import RecipeFile, say

__all__ = ["overlap", "suppress"]


def suppress(
    context: typer.Context,
    recipe: RecipeFile,
    q: Annotated[float, typer.Option(help="Per cent of the nodes.")] = 1.0,
    over: Annotated[
        str, typer.Option(help="layer-balanced: as many of each block; global: of all blocks together.")
    ] = "layer-balanced",
    draws: Annotated[int, typer.Option(help="How many random selections of the same size, the control.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the first random selection.")] = 0,
) -> None:
    """Score the base without the nodes that attribution finds highest, or lowest, or as many others (LoKI Table 5a)."""
    from keeptune.recipe.schema import load_recipe, parse_overrides
    from keeptune.report.nodes import print_suppressed
    from keeptune.studies.suppress import suppress as measure

    found = measure(load_recipe(recipe, parse_overrides(context.args)), q=q, over=over, draws=draws, seed=seed)
    print_suppressed(found, Console())
    say(f"figures and numbers in {found['folder']}")


def overlap(
    context: typer.Context,
    recipe: RecipeFile,
    against: Annotated[
        Path | None, typer.Option(help="A recipe of the same base with other knowledge, for the second.")
    ] = None,
    first: Annotated[
        str,
        typer.Option(
            help="paper, release or current; layer-balanced, global-low or another selection; a number of examples."
        ),
    ] = "",
    second: Annotated[str, typer.Option(help="The same for what it is compared with, such as current,50.")] = "",
    q: Annotated[float | None, typer.Option(help="Per cent of the nodes; default: the recipe's, or 10.")] = None,
) -> None:
    """Compare the rows that two presets, selections, numbers of examples or data sets select (LoKI's 97.57%)."""
    from keeptune.recipe.schema import load_recipe, parse_overrides
    from keeptune.report.nodes import print_overlap
    from keeptune.studies.overlap import overlap as measure

    changes = parse_overrides(context.args)
    loaded = load_recipe(recipe, changes)
    found = measure(loaded, None if against is None else load_recipe(against, changes), first=first, second=second, q=q)
    print_overlap(found, Console())
    say(f"figure and numbers in {found['folder']}")
