"""All benchmarks, as ratios in one run: `make bench`, or name some: `python benchmarks/run.py stats_pass`."""

from __future__ import annotations

import importlib
import sys

from rich.console import Console
from rich.table import Table

ALL = (
    "lora_null_build",
    "corda_build",
    "farss_build",
    "gradient_pass",
    "curvature_pass",
    "stats_pass",
    "blockwise",
    "training_step",
    "penalty_step",
    "keep_step",
    "plan_memory",
    "tracing",
    "attribution",
    "repair",
    "quantised_plan",
    "scored_logits",
)


def main() -> None:
    """Run the benchmarks and print one table."""
    table = Table(box=None)
    for head in ("benchmark", "plain", "keeptune", "ratio", "check"):
        table.add_column(head, overflow="fold")
    for name in sys.argv[1:] or ALL:
        for row in importlib.import_module(name).rows():
            table.add_row(*row.values())
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
