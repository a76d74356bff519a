"""Commands that start another program: launch, a command in several processes; llamafactory, with keeptune in it."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer import echo

from keeptune.cli.shared import RecipeFile, load, overrides_of


def launch(
    context: typer.Context,
    recipe: RecipeFile,
    processes: Annotated[
        int | None, typer.Option(help="How many, on all machines together; default: one for each GPU.")
    ] = None,
    sharding: Annotated[
        str | None,
        typer.Option(help="single_gpu, multi_gpu (DDP), fsdp2, zero1, zero2 or zero3; default: one of the first two."),
    ] = None,
    machines: Annotated[int, typer.Option(help="How many machines; each starts this command.")] = 1,
    machine_rank: Annotated[int, typer.Option(help="Which of them this is, from 0.")] = 0,
    address: Annotated[str | None, typer.Option(help="host:port of machine 0, of several.")] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Minutes after which a process that does not answer ends all; default: 60.")
    ] = None,
    command: Annotated[str, typer.Option(help="The command to start.")] = "run",
) -> None:
    """Start a command in several processes, by accelerate's configuration that fits; print what one types for that."""
    from keeptune.pipeline.launching import Launch, configured, start
    from keeptune.recipe.reading import read_values
    from keeptune.recipe.schema import parse_overrides

    values = read_values(recipe, parse_overrides([word for word in context.args if word != "--json"]))
    if not isinstance(values.get("output"), str):
        load(recipe, context)  # says so
    cpu = values.get("device") == "cpu"
    asked = Launch(processes, sharding, machines, machine_rank, address, timeout, cpu).checked()
    words = ["keeptune", command, str(recipe), *context.args]
    if asked.processes == 1:
        from keeptune.cli.main import main

        echo(shlex.join(words), err=True)
        sys.argv = words
        return main()
    with configured(asked, Path(values["output"]).expanduser()) as config:
        waits = "" if timeout is None else f"KEEPTUNE_TIMEOUT={timeout:g} "
        echo(waits + shlex.join(asked.words(config, words)), err=True)
        code = start(asked, config, words)
    raise typer.Exit(code)


def llamafactory(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="LLaMA-Factory's YAML file, with a section `keeptune:`.")],
) -> None:
    """Train with LLaMA-Factory, and keeptune in its trainer; its keys can be set as --key value."""
    from keeptune.hosts.programs import run_llamafactory

    run_llamafactory(file, overrides_of(context))
