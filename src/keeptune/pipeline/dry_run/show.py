"""Prints the account of one run, or of several."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from keeptune.core.errors import RecipeError
from keeptune.pipeline.dry_run.account import DryRun, Need, Scored
from keeptune.pipeline.dry_run.estimate import gemm_rate
from keeptune.report.numbers import count, duration

__all__ = ["Rate", "print_accounts", "size", "stated_rate"]

_WORK = {"statistics": "statistics", "train": "training", "score": "scoring"}


@dataclass(frozen=True)
class Rate:
    """Speed on which estimated times rest.

    Args:
        flops: Floating-point operations in a second.
        source: Origin of the number.
    """

    flops: float
    source: str

    def __str__(self) -> str:
        """Returns the rate with its origin."""
        return f"at {self.flops:.1e} operations a second ({self.source})"

    def time(self, work: float) -> str:
        """Returns the time that some operations take."""
        return duration(work / self.flops)


def stated_rate(flops: float | None, device: str) -> Rate:
    """Returns the given rate, or that of this machine's matrix products.

    Raises:
        RecipeError: The given rate is not above 0.
    """
    if flops is None:
        return Rate(gemm_rate(device), f"matrix products of this machine, {device}")
    if not 0 < flops < math.inf:
        raise RecipeError(
            "--flops", got=str(flops), wanted="a number above 0", next_step="Give the machine's rate, such as 4e14."
        )
    return Rate(flops, "given")


def print_accounts(runs: Mapping[str, tuple[int, DryRun]], console: Console, rate: Rate) -> None:
    """Prints the account of one run, or what several share once and a line for each.

    Args:
        runs: Name of a method or stage to how often it runs, over rates and seeds, and the account of one run.
        console: Where to print.
        rate: The speed on which times rest.
    """
    accounts = [dry for _, dry in runs.values()]
    first = accounts[0]
    needs = dict.fromkeys(need for dry in accounts for need in dry.needs)
    _section(console, "fetch", [_fetch(need) for need in needs if not need.at_hand])
    if len(accounts) == 1:
        _section(console, "train", _train(first))
    else:
        _section(console, "train", [_model(first)])
        console.print(_table(runs, rate))
    _section(console, "score", [_scored(one) for one in first.score])
    if len(accounts) == 1:
        _section(console, "memory", _memory(first))
        _section(console, "time", [*_times(first, rate), f"{rate}; a run reaches a part of that"])
    else:
        _say(console, _whole_time(runs, rate))
    for note in dict.fromkeys(note for dry in accounts for note in dry.notes):
        _say(console, f"note: {note}")


def _say(console: Console, text: str) -> None:
    console.print(Text(text), soft_wrap=True)


def _section(console: Console, title: str, lines: Sequence[str]) -> None:
    _say(console, title)
    for line in lines or ["nothing"]:
        _say(console, f"  {line}")


def _fetch(need: Need) -> str:
    revision = f", revision {need.revision}" if need.revision else ""
    return f"{need.what} {need.name}{revision}" + (f", about {size(need.size)}" if need.size else "")


def _model(dry: DryRun) -> str:
    shape = dry.shape
    return f"{shape.name}, {count(shape.parameters)} parameters, {shape.dtype}; shape from {shape.source}"


def _table(runs: Mapping[str, tuple[int, DryRun]], rate: Rate) -> Table:
    table = Table("", "trained", "steps", "memory", "statistics", "a run", "runs", box=None, header_style="bold")
    for name, (times, dry) in runs.items():
        train, work = dry.train, dry.whole_work
        table.add_row(
            Text(f"  {name}"),
            f"{'~' if train.assumed else ''}{count(train.numbers)}",
            "?" if train.steps is None else f"{train.steps:,}",
            size(dry.memory.total),
            size(dry.sums) if dry.sums else "",
            "?" if work is None else ("<" if dry.bounds else "") + rate.time(work),
            str(times),
        )
    return table


def _train(dry: DryRun) -> list[str]:
    train = dry.train
    what = f"{train.targets} targets ({', '.join(train.roles)})" if train.targets else "all weights"
    about = "about " if train.assumed else ""
    share = 100 * train.numbers / dry.shape.parameters
    lines = [
        f"{train.method} on {what} of {_model(dry)}",
        f"{about}{train.numbers:,} trained parameters ({count(train.numbers)}, {share:.2f}%)",
    ]
    if train.steps is None or train.tokens is None:
        lines.append(f"batches of {train.batch}; how many examples there are is not known without task.examples")
    else:
        over = "" if train.examples is None else f" over {train.examples:,} examples"
        tokens = f"{'' if train.measured else 'at most '}{train.tokens:,.0f} tokens ({train.length:.0f} each)"
        lines.append(f"{train.steps:,} steps of {train.batch}{over}, {tokens}")
    return lines


def _scored(one: Scored) -> str:
    items = "items not known" if one.items is None else f"{one.items:,} items, before and after"
    return f"{one.name} ({one.role}, {one.metric}): {items}"


def _memory(dry: DryRun) -> list[str]:
    memory, base = dry.memory, dry.shape.size * dry.shape.parameters
    lines = [
        f"training {size(memory.total)}: weights {size(memory.weights)}, gradients {size(memory.gradients)}, "
        f"optimiser {size(memory.optimizer)}, activations {size(memory.activations)}"
    ]
    if dry.sums:
        lines.append(f"statistics {size(base + dry.sums)}: weights {size(base)}, sums {size(dry.sums)}")
    if dry.score:
        lines.append(f"scoring {size(base + dry.cache)}: weights {size(base)}, keys and values {size(dry.cache)}")
    return lines


def _times(dry: DryRun, rate: Rate) -> list[str]:
    lines = []
    for part, name in _WORK.items():
        work, most = dry.work[part], "at most " if part in dry.bounds else ""
        if work is None:
            lines.append(f"{name}: not known")
        elif work:
            lines.append(f"{name} {most}{rate.time(work)} ({most}{work:.1e} operations)")
    return lines


def _whole_time(runs: Mapping[str, tuple[int, DryRun]], rate: Rate) -> str:
    number = sum(times for times, _ in runs.values())
    work = [times * dry.whole_work for times, dry in runs.values() if dry.whole_work is not None]
    if len(work) < len(runs):
        return f"{number} runs; how long is not known"
    most = "at most " if any(dry.bounds for _, dry in runs.values()) else ""
    return f"{number} runs, {most}{rate.time(sum(work))} {rate}"


def size(number: int) -> str:
    """Returns bytes with a unit.

    >>> size(13_476_831_232), size(1500), size(0)
    ('13.5 GB', '1.5 kB', '0 B')
    """
    value, unit = float(number), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if value >= 99.5 or unit == "B" else f"{value:.1f} {unit}"
