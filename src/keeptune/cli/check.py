"""The command that holds a trained model against its base, as a gate: check."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from typer import echo

from keeptune.cli.shared import Base, Device

LOST = 3  # exit code


def check(
    adapter: Annotated[str, typer.Argument(help="Any PEFT adapter, or a run folder.", show_default=False)],
    suite: Annotated[Path, typer.Option(help="A YAML file with an `evaluate` list, as a recipe has.")],
    max_loss: Annotated[
        list[str] | None,
        typer.Option(help="What each benchmark may lose, or benchmark=number: a share or nats per token; 0.01."),
    ] = None,
    base: Base = None,
    estimate: Annotated[
        str, typer.Option(help="What counts: mean, or the lower or upper end of its 95% interval.")
    ] = "mean",
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print the record as JSON.")] = False,
) -> None:
    """Score an adapter against its base; exit code 3 where it lost more of a benchmark than it may."""
    from keeptune.experiments.choice import parse_max_loss
    from keeptune.experiments.gate import check as check_adapter
    from keeptune.report.tables.plan_tables import print_check

    limits = parse_max_loss(max_loss) if max_loss else 0.01
    record = check_adapter(adapter, suite, limits, base=base, estimate=estimate, device=device)  # type: ignore[arg-type]
    if as_json:
        echo(json.dumps(record, indent=2, ensure_ascii=False))
    else:
        print_check(record, Console())
    if not record["passed"]:
        sys.exit(LOST)
