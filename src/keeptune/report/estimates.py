"""The runs of a report put together: methods with their seeds, and their means with intervals.

Intervals are those of :mod:`keeptune.core.intervals`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from keeptune.core.intervals import Estimate, Triple, combine, mean_of_seeds
from keeptune.report.records import Benchmark, PlanRow, Report, Run

Measure = Literal["lost", "gained", "learned", "kept"]
Series = Benchmark  # of several runs; what they share is read from the first


@dataclass(frozen=True)
class Method:
    """All runs that share a label."""

    label: str
    runs: tuple[Run, ...]

    @property
    def plan(self) -> tuple[PlanRow, ...]:
        """The plan of its first run that has one."""
        return next((run.plan for run in self.runs if run.plan), ())


def methods(report: Report) -> tuple[Method, ...]:
    """Returns the runs grouped by label, in the order in which labels first appear."""
    by_label: dict[str, list[Run]] = {}
    for run in report.runs:
        by_label.setdefault(run.label, []).append(run)
    return tuple(Method(label, tuple(runs)) for label, runs in by_label.items())


def series(report: Report, role: str) -> tuple[Series, ...]:
    """Returns the benchmarks of one role, ``"knowledge"`` or ``"task"``, in the order in which they first appear."""
    items: dict[str, Series] = {}
    for item in (item for run in report.runs for item in run.benchmarks if item.role == role):
        items.setdefault(item.name, item)
    return tuple(items.values())


def yardstick(report: Report, role: str) -> tuple[Series, ...]:
    """Returns the benchmarks of one unit that a role is judged by: its accuracies, or its first one in nats."""
    known = series(report, role)
    return tuple(item for item in known if not item.lower_is_better) or known[:1]


def mean_of(method: Method, read: Callable[[Run], float | None]) -> Estimate | None:
    """Returns the mean of a number over the seeds of a method; None when no run has it."""
    return mean_of_seeds([value for run in method.runs if (value := read(run)) is not None])


def change(method: Method, name: str) -> Estimate | None:
    """Returns after minus before on one benchmark; None when no run has the benchmark."""
    return combine([(item.after - item.before, item.low, item.high) for item in _items(method, name)])


def over(method: Method, measure: Measure, chosen: Sequence[Series]) -> Estimate | None:
    """Returns a measure averaged over benchmarks of one unit, then over the runs that have them all.

    ``"lost"`` and ``"gained"`` are by training, ``"learned"`` is the score after, ``"kept"`` per cent of that before.

    Returns:
        None when every run lacks one of them.
    """
    names = {item.name for item in chosen}
    runs = []
    for run in method.runs:
        triples = [_measured(item, measure) for item in run.benchmarks if item.name in names]
        if triples and len(triples) == len(names):
            mid, low, high = (math.fsum(triple[part] for triple in triples) / len(triples) for part in range(3))
            runs.append((mid, low, high))
    return combine(runs)


def relation_losses(report: Report, kind: Series) -> dict[str, tuple[int, list[float]]]:
    """Returns each relation's (group's) number of questions and each method's mean loss, the most forgotten first.

    Losses are in points or nats per token; NaN for none.
    """
    known = methods(report)
    sizes: dict[str, int] = {}
    losses: dict[tuple[str, str], list[float]] = {}
    sign = 1.0 if kind.lower_is_better else -100.0
    for method in known:
        for item in _items(method, kind.name):
            for name, group in item.groups.items():
                sizes[name] = max(sizes.get(name, 0), group.n)
                losses.setdefault((name, method.label), []).append(sign * (group.after - group.before))
    table = {}
    for name, size in sizes.items():
        means = [mean_of_seeds(losses.get((name, method.label), [])) for method in known]
        table[name] = (size, [math.nan if mean is None else mean.mean for mean in means])

    def order(row: tuple[str, tuple[int, list[float]]]) -> tuple[float, str]:
        good = [value for value in row[1][1] if math.isfinite(value)]
        return (-math.fsum(good) / len(good) if good else math.inf), row[0]

    return dict(sorted(table.items(), key=order))


def totals(rows: Sequence[Mapping[str, Any]], *keys: str) -> dict[Any, dict[str, float | None]]:
    """Returns changes of weights put together by layer, role or both: roots of sums of squares.

    Rows have ``layer``, ``role``, ``norm`` and ``weight``; values of the key as text (of several, a tuple) lead to
    ``norm``, ``weight`` and ``relative`` (None for weights of zero). Layers alone are sorted, without what is outside
    any block.
    """
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        if keys != ("layer",) or row["layer"] >= 0:
            groups.setdefault(row[keys[0]] if len(keys) == 1 else tuple(row[key] for key in keys), []).append(row)
    put = {}
    for key in sorted(groups) if keys == ("layer",) else groups:
        norm, weight = (math.sqrt(math.fsum(row[name] ** 2 for row in groups[key])) for name in ("norm", "weight"))
        put[str(key) if len(keys) == 1 else key] = {
            "norm": norm,
            "weight": weight,
            "relative": norm / weight if weight > 0 else None,
        }
    return put


def layer_means(rows: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """Returns the mean ``energy`` over the targets of each layer, in order, each target counting the same."""
    layers: dict[int, list[float]] = {}
    for row in rows:
        if row["layer"] >= 0 and row["energy"] is not None:
            layers.setdefault(row["layer"], []).append(row["energy"])
    return {layer: math.fsum(layers[layer]) / len(layers[layer]) for layer in sorted(layers)}


def _items(method: Method, name: str) -> list[Benchmark]:
    return [item for run in method.runs for item in run.benchmarks if item.name == name]


def _measured(item: Benchmark, measure: Measure) -> Triple:
    if measure == "learned":
        return item.after, item.before + item.low, item.before + item.high
    if measure == "kept":
        share = 100 / item.before if item.before > 0 else math.nan
        return share * item.after, share * (item.before + item.low), share * (item.before + item.high)
    gained, lost = (-1, 1) if item.lower_is_better else (1, -100)
    scale = gained if measure == "gained" else lost
    mid, *ends = (scale * value for value in (item.after - item.before, item.low, item.high))
    low, high = ends if scale > 0 else reversed(ends)
    return mid, low, high
