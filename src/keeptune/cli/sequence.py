"""keeptune run, where the recipe has stages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from typer import echo

_MEASURES = ("average_accuracy", "backward_transfer", "forward_transfer", "forgetting")


def has_stages(recipe: Path, overrides: Mapping[str, Any]) -> bool:
    """Returns whether a recipe, a YAML file with overrides, is that of a sequence."""
    from keeptune.recipe.reading import read_values

    return "stages" in read_values(recipe, overrides)


def run_stages(recipe: Path, overrides: Mapping[str, Any]) -> None:
    """Run a sequence and print its record.

    Args:
        recipe: The YAML file.
        overrides: Dotted key to value.
    """
    from keeptune.experiments.sequence.run_stages import run_sequence
    from keeptune.experiments.sequence.stages_section import load_sequence

    sequence = load_sequence(recipe, overrides)
    record = run_sequence(sequence)
    _show(record, Console())
    written = record["export"]
    if written is not None and written["error"]:
        echo(f"cut to rank {written['rank']}: {written['error']:.2%} of the change (Frobenius) is left out")
    for stage in record["stages"]:
        echo(f"after {stage['name']}: {stage['adapter']}, gap {stage['gap']:.1e} in logits to what was trained")
    echo(f"for the original base: {record['adapter']}")
    echo(f"report: {sequence.output / 'report.html'}, numbers: {sequence.output / 'sequence.json'}")


def _show(record: Mapping[str, Any], console: Console) -> None:
    from keeptune.report.tables.terminal import table

    heads = ["after"]
    for benchmark in record["benchmarks"]:
        about = benchmark["stage"] or ("keep" if benchmark["role"] == "knowledge" else "learn")
        heads.append(f"{benchmark['name']}\n({about})")
    names = ["base", *(f"{stage['name']} ({stage['method']})" for stage in record["stages"])]
    rows = []
    for name, row, intervals in zip(names, record["scores"], record["intervals"], strict=True):
        ends = ["" if pair is None else f"\n{pair[0]:+.2f} {pair[1]:+.2f}" for pair in intervals]
        rows.append((name, *(_text(score) + pair for score, pair in zip(row, ends, strict=True))))
    console.print(table(heads, rows, heads[:1]))
    echo("below a score: ends of the 95% interval of its difference to the base's, on the same items")
    echo(", ".join(f"{name.replace('_', ' ')} {_text(record[name])}" for name in _MEASURES))
    if record["why"]:
        echo(record["why"])


def _text(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
