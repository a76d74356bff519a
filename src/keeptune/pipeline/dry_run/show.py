"""Prints the account of one run, or of several."""

from collections.abc import Mapping, Sequence

import torch
from rich.console import Console

from keeptune.core.errors import RecipeError
from keeptune.pipeline.dry_run.describe import DryRun
from keeptune.pipeline.dry_run.estimate import gemm_rate
from keeptune.report.numbers import count, duration
from keeptune.report.tables.terminal import say, table
from keeptune.statistics.store_use import size_text

_WORK = {"knowledge": "writing knowledge", "statistics": "statistics", "train": "training", "score": "scoring"}
_HEADS = ("run", "trained", "steps", "memory", "store", "time", "runs")


def print_accounts(
    runs: Mapping[str, tuple[int, DryRun]], console: Console, *, flops: float | None, device: str
) -> None:
    """Prints the account of one run, or what several share once and a line for each.

    Args:
        runs: Name of a method or stage to how often it runs, over rates and seeds, and the account of one run.
        console: Where to print.
        flops: Operations a second that times rest on; None measures the matrix products of this machine.
        device: The device that is measured.

    Raises:
        RecipeError: This machine lacks the device to measure.
    """
    if flops is None and torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise RecipeError(
            "device",
            got=f"{device}, which this machine lacks",
            wanted="a device whose rate can be measured",
            next_step="Give the rate of that device in operations a second, such as --flops 4e14.",
        )
    rate = gemm_rate(device) if flops is None else flops
    measured = f"matrix products of this machine, {device}" if flops is None else "given"
    source = f"at {rate:.1e} operations a second ({measured})"
    accounts = [dry for _, dry in runs.values()]
    first, one = accounts[0], len(accounts) == 1
    fetched = []
    for need in dict.fromkeys(need for dry in accounts for need in dry.needs if not need.at_hand):
        revision = f", revision {need.revision}" if need.revision else ""
        size = f", about {size_text(need.size)}" if need.size else ""
        fetched.append(f"{need.what} {need.name}{revision}{size}")
    _section(console, "fetch", fetched)
    _section(console, "train", _train(first) if one else [_model(first)])
    if not one:
        rows = [_row(name, times, dry, rate) for name, (times, dry) in runs.items()]
        console.print(table(_HEADS, rows, left=_HEADS[:1]))
    scored = []
    for entry in first.score:
        items = "items not known" if entry.items is None else f"{entry.items:,} items, before and after"
        scored.append(f"{entry.name} ({entry.role}, {entry.metric}): {items}")
    _section(console, "score", scored)
    if one:
        _section(console, "memory", _amounts(first.memory, first.peak))
        _section(console, "disk", _amounts(first.disk))
        _section(console, "time", [*_times(first, rate), f"{source}; a run reaches a part of that"])
    else:
        number = sum(times for times, _ in runs.values())
        work = [times * dry.whole_work for times, dry in runs.values() if dry.whole_work is not None]
        most = "at most " if any(dry.bounds for dry in accounts) else ""
        known = f"{number} runs, {most}{duration(sum(work) / rate)}"
        say(console, f"{known if len(work) == len(runs) else f'{number} runs; how long is not known'} {source}")
    for note in dict.fromkeys(note for dry in accounts for note in dry.notes):
        say(console, f"note: {note}")


def _section(console: Console, title: str, lines: Sequence[str]) -> None:
    for line in (title, *(f"  {line}" for line in lines or ["nothing"])):
        say(console, line)


def _model(dry: DryRun) -> str:
    shape = dry.shape
    packed = ", quantised" if dry.quantization else ""
    return f"{shape.name}, {count(shape.parameters)} parameters, {shape.dtype}{packed}; shape from {shape.source}"


def _row(name: str, times: int, dry: DryRun, rate: float) -> tuple[str, ...]:
    train, work, store = dry.train, dry.whole_work, sum(dry.disk["store"].values())
    return (
        name,
        f"{'~' if train.assumed else ''}{count(train.numbers)}",
        "?" if train.steps is None else f"{train.steps:,}",
        f"{size_text(sum(dry.memory[dry.peak].values()))} ({dry.peak})",
        size_text(store) if store else "",
        "?" if work is None else ("<" if dry.bounds else "") + duration(work / rate),
        str(times),
    )


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


def _amounts(amounts: Mapping[str, Mapping[str, int]], peak: str = "") -> list[str]:
    lines = []
    for name, numbers in amounts.items():
        parts = ", ".join(f"{part} {size_text(number)}" for part, number in numbers.items() if number)
        most = " (the peak)" if name == peak else ""
        lines.append(f"{name} {size_text(sum(numbers.values()))}{most}{': ' if parts else ''}{parts}")
    return lines


def _times(dry: DryRun, rate: float) -> list[str]:
    lines = []
    for part, name in _WORK.items():
        work, most = dry.work[part], "at most " if part in dry.bounds else ""
        if work is None:
            lines.append(f"{name}: not known")
        elif work:
            lines.append(f"{name} {most}{duration(work / rate)} ({most}{work:.1e} operations)")
    return lines
