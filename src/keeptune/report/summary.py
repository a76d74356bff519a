"""Put the seeds of a method together: means, 95% intervals, what was learned and what was lost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from keeptune.core.intervals import Estimate, Triple, combine, lower_is_better
from keeptune.report.records import Benchmark, Report, Run

__all__ = [
    "Method",
    "Series",
    "change",
    "forgetting",
    "kept",
    "learned",
    "lost",
    "mean_of",
    "methods",
    "series",
]


@dataclass(frozen=True)
class Method:
    """All runs that share a label."""

    label: str
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Series:
    """A benchmark as it appears across runs."""

    name: str
    role: str
    metric: str

    @property
    def lower_is_better(self) -> bool:
        """Tell whether a smaller value is a better one.

        Returns:
            True for a cross entropy, False for an accuracy.
        """
        return lower_is_better(self.metric)


def methods(report: Report) -> tuple[Method, ...]:
    """Group the runs by label.

    Args:
        report: The report.

    Returns:
        The methods in the order in which they first appear.
    """
    by_label: dict[str, list[Run]] = {}
    for run in report.runs:
        by_label.setdefault(run.label, []).append(run)
    return tuple(Method(label, tuple(runs)) for label, runs in by_label.items())


def series(report: Report, role: str) -> tuple[Series, ...]:
    """List the benchmarks of one role.

    Args:
        report: The report.
        role: "knowledge" or "task".

    Returns:
        Every benchmark of that role, in the order in which they first appear.
    """
    found: dict[str, Series] = {}
    for run in report.runs:
        for item in run.benchmarks:
            if item.role == role:
                found.setdefault(item.name, Series(item.name, role, item.metric))
    return tuple(found.values())


def mean_of(method: Method, read: Callable[[Run], float | None]) -> Estimate | None:
    """Average a plain number over the seeds of a method.

    Args:
        method: The method.
        read: Takes the number from a run.

    Returns:
        The mean with its t-interval over seeds, None when no run has the number.
    """
    found = [value for value in map(read, method.runs) if value is not None]
    return combine([(value, math.nan, math.nan) for value in found])


def change(method: Method, name: str) -> Estimate | None:
    """Average after minus before on one benchmark.

    Args:
        method: The method.
        name: The benchmark.

    Returns:
        The change, None when no run has the benchmark.
    """
    rows = [item for run in method.runs for item in run.benchmarks if item.name == name]
    return combine([(item.after - item.before, item.low, item.high) for item in rows])


def forgetting(method: Method, name: str) -> Estimate | None:
    """Average what was lost on one benchmark: points of accuracy or nats per token.

    Args:
        method: The method.
        name: The benchmark.

    Returns:
        The loss, positive when something was forgotten; None when no run has the benchmark.
    """
    rows = [item for run in method.runs for item in run.benchmarks if item.name == name]
    return combine([_loss_of(item) for item in rows])


def lost(method: Method, chosen: Sequence[Series]) -> Estimate | None:
    """Average the forgetting over several benchmarks of one unit.

    Args:
        method: The method.
        chosen: The benchmarks.

    Returns:
        The mean loss, None when a run lacks them all.
    """
    return combine([triple for run in method.runs if (triple := _mean_triple(run, chosen, _loss_of))])


def learned(method: Method, chosen: Sequence[Series]) -> Estimate | None:
    """Average the task score after training over several benchmarks of one unit.

    Args:
        method: The method.
        chosen: The task benchmarks.

    Returns:
        The mean score, None when a run lacks them all.
    """
    return combine([triple for run in method.runs if (triple := _mean_triple(run, chosen, _after_of))])


def kept(method: Method, chosen: Sequence[Series]) -> Estimate | None:
    """Average the share of knowledge accuracy that is left, in percent.

    Args:
        method: The method.
        chosen: The knowledge benchmarks, accuracies only.

    Returns:
        The mean share, None when a run lacks them all.
    """
    return combine([triple for run in method.runs if (triple := _mean_triple(run, chosen, _share_of))])


def _mean_triple(run: Run, chosen: Sequence[Series], read: Callable[[Benchmark], Triple]) -> Triple | None:
    """Average a quantity over the chosen benchmarks of one run.

    Args:
        run: The run.
        chosen: The benchmarks.
        read: Takes value, low and high from a benchmark.

    Returns:
        The averaged triple; None when the run lacks one of them, since a mean over fewer benchmarks
        would not compare with the other runs.
    """
    names = {item.name for item in chosen}
    triples = [read(item) for item in run.benchmarks if item.name in names]
    if not triples or len(triples) < len(names):
        return None
    low, mid, high = (math.fsum(triple[part] for triple in triples) / len(triples) for part in (1, 0, 2))
    return mid, low, high


def _loss_of(item: Benchmark) -> Triple:
    """Take the forgetting on a benchmark.

    Args:
        item: The benchmark.

    Returns:
        Value, low and high, in points or nats per token.
    """
    if item.lower_is_better:
        return item.after - item.before, item.low, item.high
    return 100 * (item.before - item.after), -100 * item.high, -100 * item.low


def _after_of(item: Benchmark) -> Triple:
    """Take the score after training.

    Args:
        item: The benchmark.

    Returns:
        Value, low and high.
    """
    return item.after, item.before + item.low, item.before + item.high


def _share_of(item: Benchmark) -> Triple:
    """Take the share of the score that is left.

    Args:
        item: The benchmark.

    Returns:
        Value, low and high in percent; NaN when there was nothing to lose.
    """
    if not item.before > 0:
        return math.nan, math.nan, math.nan
    scale = 100 / item.before
    return scale * item.after, scale * (item.before + item.low), scale * (item.before + item.high)
