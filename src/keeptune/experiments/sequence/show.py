"""The record of a sequence on the console: the matrix stage x benchmark and what it says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console

from keeptune.report.tables.terminal import table_frame

__all__ = ["print_sequence"]

_MEASURES = {
    "average_accuracy": "average accuracy",
    "backward_transfer": "backward transfer",
    "forward_transfer": "forward transfer",
    "forgetting": "forgetting",
}


def print_sequence(record: Mapping[str, Any], console: Console) -> None:
    """Print a sequence.

    Args:
        record: As in ``sequence.json``.
        console: Where to print.
    """
    table = table_frame()
    table.add_column("after")
    for benchmark in record["benchmarks"]:
        about = benchmark["stage"] or ("keep" if benchmark["role"] == "knowledge" else "learn")
        table.add_column(f"{benchmark['name']}\n({about})", justify="right")
    names = ["base", *(f"{stage['name']} ({stage['method']})" for stage in record["stages"])]
    for name, row, intervals in zip(names, record["scores"], record["intervals"], strict=True):
        table.add_row(name, *(_cell(*cell) for cell in zip(row, intervals, strict=True)))
    console.print(table)
    console.print(
        "below a score: ends of the 95% interval of its difference to the base's, on the same items", markup=False
    )
    told = [f"{label} {_text(record[name], '.3f')}" for name, label in _MEASURES.items()]
    console.print(", ".join(told), markup=False, highlight=False, soft_wrap=True)
    if record["why"]:
        console.print(record["why"], markup=False, highlight=False, soft_wrap=True)


def _cell(score: float | None, interval: list[float] | None) -> str:
    note = "" if interval is None else f"\n{interval[0]:+.2f} {interval[1]:+.2f}"
    return _text(score, ".3f") + note


def _text(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
