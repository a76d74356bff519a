"""Print a dry run: what would be fetched, trained and scored, with memory and time."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from keeptune.core.errors import RecipeError
from keeptune.pipeline.dry_run.account import DryRun, Named, Part
from keeptune.pipeline.dry_run.estimate import gemm_rate
from keeptune.report.numbers import count, duration

__all__ = ["print_dry", "print_several", "size", "stated_rate"]

_PARTS = {"statistics": "statistics", "train": "training", "score": "scoring"}


def print_dry(dry: DryRun, console: Console, *, rate: float, rate_from: str) -> None:
    """Print the account of a run.

    Args:
        dry: From :func:`keeptune.pipeline.dry_run.describe.describe`.
        console: Where to print.
        rate: Floating-point operations in a second, on which the times rest.
        rate_from: Where the rate is from.
    """
    for title, lines in (
        ("fetch", _fetch(dry.needs)),
        ("train", _train(dry)),
        ("score", _score(dry)),
        ("memory", _memory(dry)),
        ("time", _time(dry, rate, rate_from)),
    ):
        _section(console, title, lines)
    for note in dry.notes:
        _say(console, f"note: {note}")


def print_several(parts: Sequence[Part], console: Console, *, rate: float, rate_from: str) -> None:
    """Print the account of some runs: what they share once, and a line for each.

    Args:
        parts: The runs; of one alone, all of its account is printed.
        console: Where to print.
        rate: Floating-point operations in a second, on which the times rest.
        rate_from: Where the rate is from.
    """
    first = parts[0].dry
    if len(parts) == 1:
        print_dry(first, console, rate=rate, rate_from=rate_from)
        return
    needs = dict.fromkeys(named for part in parts for named in part.dry.needs)
    _section(console, "fetch", _fetch(list(needs)))
    shape = first.shape
    _say(console, "train")
    _say(
        console,
        f"  {shape.name}, {count(shape.parameters)} parameters, {shape.dtype}; shape from {shape.source}",
    )
    table = Table("", "trained", "steps", "memory", "statistics", "a run", "runs", box=None, header_style="bold")
    for part in parts:
        dry, about = part.dry, "~" if part.dry.train.assumed else ""
        steps = "?" if dry.train.steps is None else f"{dry.train.steps:,}"
        table.add_row(
            Text(f"  {part.name}"),
            f"{about}{count(dry.train.numbers)}",
            steps,
            size(dry.memory.total),
            size(dry.sums) if dry.sums else "",
            _whole_time(dry, rate),
            str(part.runs),
        )
    console.print(table)
    _section(console, "score", _score(first))
    total = [_work(part.dry) for part in parts]
    runs = sum(part.runs for part in parts)
    most = "at most " if any(part.dry.bounds for part in parts) else ""
    if None in total:
        _say(console, f"{runs} runs; how long is not known")
    else:
        seconds = sum(part.runs * (_work(part.dry) or 0.0) for part in parts) / rate
        _say(console, f"{runs} runs, {most}{duration(seconds)} at {rate:.1e} operations a second ({rate_from})")
    for note in dict.fromkeys(note for part in parts for note in part.dry.notes):
        _say(console, f"note: {note}")


def _section(console: Console, title: str, lines: Sequence[str]) -> None:
    _say(console, title)
    for line in lines or ["nothing"]:
        _say(console, f"  {line}")


def _work(dry: DryRun) -> float | None:
    parts = [dry.work[part] for part in _PARTS]
    return None if None in parts else sum(part or 0.0 for part in parts)


def _whole_time(dry: DryRun, rate: float) -> str:
    work = _work(dry)
    return "?" if work is None else ("<" if dry.bounds else "") + duration(work / rate)


def stated_rate(flops: float | None, device: str) -> tuple[float, str]:
    """Say on what rate times rest: the one that is given, or that of this machine's matrix products.

    Args:
        flops: Operations a second; None measures.
        device: Where products are measured.

    Returns:
        The rate, and where it is from.

    Raises:
        RecipeError: The given rate is not above 0.
    """
    if flops is None:
        return gemm_rate(device), f"matrix products of this machine, {device}"
    if not 0 < flops < math.inf:
        raise RecipeError(
            "--flops", got=str(flops), wanted="a number above 0", next_step="Give the machine's rate, such as 4e14."
        )
    return flops, "given"


def _say(console: Console, text: str) -> None:
    console.print(Text(text), soft_wrap=True)


def _fetch(needs: Sequence[Named]) -> list[str]:
    missing = [named for named in needs if not named.at_hand]
    return [
        f"{named.what} {named.name}"
        + (f", revision {named.revision}" if named.revision else "")
        + (f", about {size(named.size)}" if named.size else ", size not known")
        for named in missing
    ]


def _train(dry: DryRun) -> list[str]:
    train, shape = dry.train, dry.shape
    about = "about " if train.assumed else ""
    what = f"{train.targets} targets ({', '.join(train.roles)})" if train.targets else "all weights"
    share = 100 * train.numbers / shape.parameters
    lines = [
        f"{train.method} on {what} of {shape.name} ({count(shape.parameters)} parameters, {shape.dtype}; "
        f"shape from {shape.source})",
        f"{about}{train.numbers:,} trained parameters ({count(train.numbers)}, {share:.2f}%)",
    ]
    if train.steps is None or train.tokens is None:
        lines.append(f"batches of {train.batch}; how many examples there are is not known")
    else:
        of = "" if train.examples is None else f" over {train.examples:,} examples"
        most = "" if train.measured else "at most "
        tokens = f"{most}{train.tokens:,.0f} tokens ({train.length:.0f} each)"
        lines.append(f"{train.steps:,} steps of {train.batch}{of}, {tokens}")
    return lines


def _score(dry: DryRun) -> list[str]:
    return [
        f"{one.name} ({one.role}, {one.metric}): "
        + ("items not known" if one.items is None else f"{one.items:,} items, before and after")
        for one in dry.score
    ]


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


def _time(dry: DryRun, rate: float, rate_from: str) -> list[str]:
    lines = []
    for part, name in _PARTS.items():
        work = dry.work[part]
        if work is None:
            lines.append(f"{name}: not known")
        elif work:
            most = "at most " if part in dry.bounds else ""
            lines.append(f"{name} {most}{duration(work / rate)} ({most}{work:.1e} operations)")
    lines.append(f"at {rate:.1e} operations a second ({rate_from}); a run reaches a part of that")
    return lines


def size(number: int) -> str:
    """Print bytes.

    Args:
        number: Bytes.

    Returns:
        The text.

    >>> size(13_476_831_232), size(1500), size(0)
    ('13.5 GB', '1.5 kB', '0 B')
    """
    value, unit = float(number), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if value >= 99.5 or unit == "B" else f"{value:.1f} {unit}"
