"""What commands share: their common arguments and options, how these are read, and how lines are printed."""

from __future__ import annotations

import contextlib
import functools
import inspect
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console

from keeptune.core.errors import RecipeError

if TYPE_CHECKING:
    from keeptune.pipeline.job import Job
    from keeptune.recipe.schema import Recipe

N = TypeVar("N", int, float)


class ExitCode(IntEnum):
    """What a command ends with (docs/guides/commands.md)."""

    DONE = 0
    FAILED = 1  # a run of several, or a check of the machine
    WRONG = 2  # what the user can correct; nothing was done, or what was done stays
    LOST = 3  # an adapter lost more than it may
    INTERRUPTED = 130


# Commands that take a recipe: every key of it is an option.
OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True}

RecipeFile = Annotated[Path, typer.Argument(help="The recipe, a YAML file.", show_default=False)]
Base = Annotated[str | None, typer.Option(help="The base model; default: the one that the adapter or run names.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
FigureFile = Annotated[Path, typer.Option(help="The figure; its numbers are written beside it as .json.")]
Flops = Annotated[
    float | None,
    typer.Option(min=1, help="With --dry-run: operations per second that times rest on; default: measured here."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the numbers as JSON, and nothing else.")]
Roles = Annotated[str | None, typer.Option(help="Roles, such as q_proj,down_proj; default: all.")]
Store = Annotated[Path | None, typer.Option(help="Store of statistics; default: the user's cache.")]


@dataclass(frozen=True)
class Ended:
    """What a command found, where its exit code is not 0."""

    record: Any
    code: ExitCode


class Commands(typer.Typer):
    """Commands that print for a person and return the same numbers, which ``--json`` prints in place of it."""

    def command(self, *names: Any, **options: Any) -> Callable[[Any], Any]:
        """Registers a command; one with ``as_json`` among its arguments is told of the option."""
        register = super().command(*names, **options)
        return lambda function: register(with_json(function))


def with_json(function: Callable[..., Any]) -> Callable[..., None]:
    """Gives a command the option ``--json``, which prints what it returns, and its exit code."""
    signature = inspect.signature(function, eval_str=True)
    told = "as_json" in signature.parameters
    option = inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=AsJson)

    @functools.wraps(function)
    def answered(*given: Any, as_json: bool = False, **options: Any) -> None:
        with contextlib.redirect_stdout(io.StringIO()) if as_json else contextlib.nullcontext():
            found = function(*given, **options, **({"as_json": as_json} if told else {}))
        ended = found if isinstance(found, Ended) else Ended(found, ExitCode.DONE)
        if as_json and ended.record is not None:
            from keeptune.core.artefact import canonical_json  # loads torch

            typer.echo(json.dumps(json.loads(canonical_json(ended.record)), indent=2, ensure_ascii=False))
        if ended.code:
            raise typer.Exit(ended.code)

    answered.__annotations__ = function.__annotations__ | {"as_json": AsJson}
    parameters = [*signature.parameters.values(), *([] if told else [option])]
    answered.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return answered


def overrides_of(context: typer.Context) -> dict[str, Any]:
    """Returns the recipe's keys that are set on the command line, dotted key to value."""
    from keeptune.recipe.schema import parse_overrides

    return parse_overrides(context.args)


def load(recipe: Path, context: typer.Context) -> Recipe:
    """Returns a recipe with the keys that are set on the command line."""
    from keeptune.recipe.schema import load_recipe

    return load_recipe(recipe, overrides_of(context))


def job_of(recipe: Path, context: typer.Context) -> Job:
    """Returns the job of a recipe with the keys that are set on the command line; the run folder is held meanwhile."""
    from keeptune.pipeline.run import started

    return context.with_resource(started(load(recipe, context)))


def print_report(report: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Prints a report's table and where its page is, and returns it."""
    from keeptune.report.tables.comparison_table import print_comparison

    print_comparison(report, Console())
    typer.echo(f"report: {folder / 'report.html'}")
    return report


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
