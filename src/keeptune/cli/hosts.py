"""The command that runs another trainer with keeptune in it: llamafactory."""

from pathlib import Path
from typing import Annotated

import typer

from keeptune.cli.shared import overrides_of


def llamafactory(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="LLaMA-Factory's YAML file, with a section `keeptune:`.")],
) -> None:
    """Train with LLaMA-Factory, and keeptune in its trainer; its keys can be set as --key value."""
    from keeptune.hosts.programs import run_llamafactory

    run_llamafactory(file, overrides_of(context))
