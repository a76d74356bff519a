"""keeptune run, where the recipe has stages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from keeptune.cli.options import say

__all__ = ["has_stages", "run_stages"]


def has_stages(recipe: Path, overrides: Mapping[str, Any]) -> bool:
    """Tell whether a recipe is that of a sequence.

    Args:
        recipe: The YAML file.
        overrides: Dotted key to value.

    Returns:
        Whether it has ``stages``.
    """
    from keeptune.recipe.reading import read_values

    return "stages" in read_values(recipe, overrides)


def run_stages(recipe: Path, overrides: Mapping[str, Any]) -> None:
    """Run a sequence and print its record.

    Args:
        recipe: The YAML file.
        overrides: Dotted key to value.
    """
    from keeptune.experiments.sequence.engine import run_sequence
    from keeptune.experiments.sequence.schema import load_sequence
    from keeptune.experiments.sequence.show import print_sequence

    sequence = load_sequence(recipe, overrides)
    record = run_sequence(sequence)
    print_sequence(record, Console())
    written = record["export"]
    if written is not None and written["error"]:
        say(f"cut to rank {written['rank']}: {written['error']:.2%} of the change (Frobenius) is left out")
    for stage in record["stages"]:
        say(f"after {stage['name']}: {stage['adapter']}, gap {stage['gap']:.1e} in logits to what was trained")
    say(f"for the original base: {record['adapter']}")
    say(f"report: {sequence.output / 'report.html'}, numbers: {sequence.output / 'sequence.json'}")
