"""What commands share: their common arguments and options, how these are read, and how lines are printed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console

from keeptune.core.errors import RecipeError

if TYPE_CHECKING:
    from keeptune.recipe.schema import Recipe

N = TypeVar("N", int, float)

# Commands that take a recipe: every key of it is an option.
OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}

RecipeFile = Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)]
Base = Annotated[str | None, typer.Option(help="The base model; default: the one that the adapter or run names.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
FigureFile = Annotated[Path, typer.Option(help="The figure; its numbers are written beside it as .json.")]
Flops = Annotated[
    float | None,
    typer.Option(help="With --dry-run: operations per second that times are computed from; default: measured here."),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="With --dry-run: print the account as JSON, bytes and operations by part.")
]
Roles = Annotated[str | None, typer.Option(help="Roles, such as q_proj,down_proj; default: all.")]
Store = Annotated[Path | None, typer.Option(help="Store of statistics; default: the user's cache.")]


def overrides_of(context: typer.Context) -> dict[str, Any]:
    """Returns the recipe's keys that are set on the command line, dotted key to value."""
    from keeptune.recipe.schema import parse_overrides

    return parse_overrides(context.args)


def load(recipe: Path, context: typer.Context) -> Recipe:
    """Returns a recipe with the keys that are set on the command line."""
    from keeptune.recipe.schema import load_recipe

    return load_recipe(recipe, overrides_of(context))


def print_report(report: dict[str, Any], folder: Path) -> None:
    """Prints a report's table and where its page is."""
    from keeptune.report.tables.comparison_table import print_comparison

    print_comparison(report, Console())
    typer.echo(f"report: {folder / 'report.html'}")


def names_in(text: str | None) -> list[str] | None:
    """Returns the names in a list such as ``q_proj,down_proj``; None without one."""
    return None if text is None else [name.strip() for name in text.strip("[] ").split(",")]


def numbers_in(option: str, text: str | None, kind: Callable[[str], N], example: str) -> list[N]:
    """Returns the numbers in an option such as ``--sweep 0.1,0.3,1``, none without it.

    Args:
        option: The option.
        text: Its value.
        kind: ``int`` or ``float``.
        example: A value, for the error message.

    Raises:
        RecipeError: A part is no number of the kind.
    """
    try:
        return [kind(part) for part in names_in(text or None) or ()]
    except ValueError as error:
        wanted = "whole numbers" if kind is int else "numbers"
        raise RecipeError(option, got=str(text), wanted=wanted, next_step=f"Example: {option} {example}") from error
