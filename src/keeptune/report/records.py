"""Read a `report.json` into typed records, naming the key when something is missing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from keeptune.core.intervals import lower_is_better
from keeptune.report import fields

__all__ = ["Benchmark", "Group", "PlanRow", "Report", "ReportLike", "Run", "as_report", "parse_report"]


@dataclass(frozen=True)
class Group:
    """The scores on one group (relation) of a benchmark."""

    n: int
    before: float
    after: float


@dataclass(frozen=True)
class Benchmark:
    """One benchmark of one run, before and after training."""

    name: str
    role: str
    metric: str
    n: int
    before: float
    after: float
    low: float
    high: float
    kl: float | None
    groups: Mapping[str, Group]

    @property
    def lower_is_better(self) -> bool:
        """Tell whether a smaller value is a better one.

        Returns:
            True for a cross entropy, False for an accuracy.
        """
        return lower_is_better(self.metric)


@dataclass(frozen=True)
class PlanRow:
    """What a method decided for one weight matrix."""

    target: str
    layer: int | None
    role: str
    rank: int | None
    evidence: Mapping[str, tuple[float, ...]]

    @property
    def importance(self) -> float | None:
        """The importance the rank rests on.

        Returns:
            The number, None where the method weighs no importances.
        """
        values = self.evidence.get("importance", ())
        return values[0] if len(values) == 1 and math.isfinite(values[0]) else None


@dataclass(frozen=True)
class Drift:
    """What penalties cost at a step, and how far each layer was from its start."""

    step: float
    penalty: float
    layers: Mapping[int, float]


@dataclass(frozen=True)
class Run:
    """One method trained with one seed."""

    name: str
    label: str
    seed: int
    K: float | None
    T: float | None
    KT: float | None
    adapter: str
    export_gap: float | None
    options: Mapping[str, object]
    trained_parameters: int | None
    seconds: Mapping[str, float]
    loss: tuple[tuple[float, float], ...]
    drift: tuple[Drift, ...]
    plan: tuple[PlanRow, ...]
    notes: tuple[str, ...]
    benchmarks: tuple[Benchmark, ...]

    @property
    def average_forgetting(self) -> float | None:
        """The mean relative drop on the knowledge benchmarks, LoKI's Avg.

        Returns:
            1 - K; reports written before there was the key have it too.
        """
        return None if self.K is None else 1.0 - self.K


@dataclass(frozen=True)
class Report:
    """A whole report: the base model and every run."""

    base: str
    runs: tuple[Run, ...]
    version: str | None
    created: str | None


ReportLike = Mapping[str, object] | Report


def as_report(report: ReportLike) -> Report:
    """Take a report as it is or parse the raw mapping.

    Args:
        report: A parsed report, or the mapping read from `report.json`.

    Returns:
        The parsed report.

    Raises:
        ArtefactError: A required key is missing or has the wrong kind of value.
    """
    return report if isinstance(report, Report) else parse_report(report)


def parse_report(raw: Mapping[str, object]) -> Report:
    """Check and type the content of a `report.json`.

    Args:
        raw: The mapping read from the file.

    Returns:
        The parsed report; runs that repeat a label and a seed get a numbered label.

    Raises:
        ArtefactError: A required key is missing or has the wrong kind of value.
    """
    where = "report.json"
    top = fields.mapping(raw, where)
    methods = fields.sequence(fields.need(top, "methods", where), f"{where}: methods")
    runs = [_run(item, f"{where}: methods[{index}]") for index, item in enumerate(methods)]
    return Report(
        base=str(fields.need(top, "base", where)),
        runs=tuple(_number_repeats(runs)),
        version=fields.optional_text(top.get("version")),
        created=fields.optional_text(top.get("created")),
    )


def _number_repeats(runs: Sequence[Run]) -> list[Run]:
    """Give runs that repeat a label and a seed labels of their own.

    Args:
        runs: The runs in file order.

    Returns:
        The runs; the second "lora" with seed 0 is labelled "lora (2)".
    """
    seen: dict[tuple[str, int], int] = {}
    out: list[Run] = []
    for run in runs:
        count = seen.get((run.label, run.seed), 0) + 1
        seen[(run.label, run.seed)] = count
        label = run.label if count == 1 else f"{run.label} ({count})"
        out.append(Run(**{**run.__dict__, "label": label}))
    return out


def _run(item: object, where: str) -> Run:
    """Parse one entry of `methods`.

    Args:
        item: The raw entry.
        where: Its place in the file.

    Returns:
        The run.
    """
    entry = fields.mapping(item, where)
    name = str(fields.need(entry, "name", where))
    benchmarks = fields.sequence(fields.need(entry, "benchmarks", where), f"{where}.benchmarks")
    return Run(
        name=name,
        label=str(entry.get("label") or name),
        seed=fields.integer(fields.need(entry, "seed", where), f"{where}.seed"),
        K=fields.score(fields.need(entry, "K", where), f"{where}.K"),
        T=fields.score(fields.need(entry, "T", where), f"{where}.T"),
        KT=fields.score(fields.need(entry, "KT", where), f"{where}.KT"),
        adapter=str(fields.need(entry, "adapter", where)),
        export_gap=fields.score(fields.need(entry, "export_gap", where), f"{where}.export_gap"),
        options=fields.mapping(entry.get("options") or {}, f"{where}.options"),
        trained_parameters=fields.optional_integer(entry.get("trained_parameters"), f"{where}.trained_parameters"),
        seconds=fields.numbers(entry.get("seconds") or {}, f"{where}.seconds"),
        loss=_loss(entry.get("loss") or [], f"{where}.loss"),
        drift=_drift(entry.get("loss") or [], f"{where}.loss"),
        plan=tuple(
            _plan_row(row, f"{where}.plan[{index}]")
            for index, row in enumerate(fields.sequence(entry.get("plan") or [], f"{where}.plan"))
        ),
        notes=tuple(str(note) for note in fields.sequence(entry.get("notes") or [], f"{where}.notes")),
        benchmarks=tuple(_benchmark(row, f"{where}.benchmarks[{index}]") for index, row in enumerate(benchmarks)),
    )


def _benchmark(item: object, where: str) -> Benchmark:
    """Parse one benchmark of one run.

    Args:
        item: The raw entry.
        where: Its place in the file.

    Returns:
        The benchmark; values that are null or not finite become NaN.
    """
    entry = fields.mapping(item, where)
    role = str(fields.need(entry, "role", where))
    if role not in ("knowledge", "task"):
        fields.fail(f"{where}.role", f'"{role}"', '"knowledge" or "task"')
    interval = fields.need(entry, "interval", where)
    pair = fields.sequence([None, None] if interval is None else interval, f"{where}.interval")
    if len(pair) != 2:
        fields.fail(f"{where}.interval", f"{len(pair)} values", "two: low and high")
    groups = fields.mapping(entry.get("groups") or {}, f"{where}.groups")
    return Benchmark(
        name=str(fields.need(entry, "name", where)),
        role=role,
        metric=str(entry.get("metric") or "exact_match"),
        n=fields.integer(fields.need(entry, "n", where), f"{where}.n"),
        before=fields.value(fields.need(entry, "before", where), f"{where}.before"),
        after=fields.value(fields.need(entry, "after", where), f"{where}.after"),
        low=fields.value(pair[0], f"{where}.interval[0]"),
        high=fields.value(pair[1], f"{where}.interval[1]"),
        kl=fields.score(entry.get("kl_to_base"), f"{where}.kl_to_base"),
        groups={str(key): _group(value, f"{where}.groups.{key}") for key, value in groups.items()},
    )


def _group(item: object, where: str) -> Group:
    """Parse one group of a benchmark.

    Args:
        item: The raw entry.
        where: Its place in the file.

    Returns:
        The group.
    """
    entry = fields.mapping(item, where)
    return Group(
        n=fields.integer(fields.need(entry, "n", where), f"{where}.n"),
        before=fields.value(fields.need(entry, "before", where), f"{where}.before"),
        after=fields.value(fields.need(entry, "after", where), f"{where}.after"),
    )


def _plan_row(item: object, where: str) -> PlanRow:
    """Parse one row of a plan.

    Args:
        item: The raw entry.
        where: Its place in the file.

    Returns:
        The row; evidence that is not a list of numbers is left out.
    """
    entry = fields.mapping(item, where)
    target = str(entry.get("target") or "")
    evidence = fields.mapping(entry.get("evidence") or {}, f"{where}.evidence")
    kept = {str(key): value for key, value in evidence.items() if isinstance(value, list | tuple)}
    numbers = {
        key: tuple(fields.value(number, f"{where}.evidence.{key}") for number in value)
        for key, value in kept.items()
        if len(value) > 0 and not isinstance(value[0], list | tuple | str | Mapping)
    }
    return PlanRow(
        target=target,
        layer=fields.optional_integer(entry.get("layer"), f"{where}.layer"),
        role=str(entry.get("role") or target.rsplit(".", 1)[-1] or "?"),
        rank=fields.optional_integer(entry.get("rank"), f"{where}.rank"),
        evidence=numbers,
    )


def _loss(items: object, where: str) -> tuple[tuple[float, float], ...]:
    """Parse a loss history.

    Args:
        items: The raw list of steps.
        where: Its place in the file.

    Returns:
        Pairs of step and loss; values that are not finite are left out.
    """
    pairs = []
    for index, item in enumerate(fields.sequence(items, where)):
        entry = fields.mapping(item, f"{where}[{index}]")
        step = fields.value(fields.need(entry, "step", f"{where}[{index}]"), f"{where}[{index}].step")
        loss = fields.value(fields.need(entry, "loss", f"{where}[{index}]"), f"{where}[{index}].loss")
        if math.isfinite(step) and math.isfinite(loss):
            pairs.append((step, loss))
    return tuple(pairs)


_LAYER = "drift/layer_"


def _drift(items: object, where: str) -> tuple[Drift, ...]:
    """Parse what a loss history tells of penalties.

    Args:
        items: The raw list of steps.
        where: Its place in the file.

    Returns:
        One for each step with a penalty; what is outside any block has layer -1 and is left out.
    """
    found = []
    for index, item in enumerate(fields.sequence(items, where)):
        entry = fields.mapping(item, f"{where}[{index}]")
        if "penalty" not in entry:
            continue
        layers = {
            int(key.removeprefix(_LAYER)): fields.value(value, f"{where}[{index}].{key}")
            for key, value in entry.items()
            if key.startswith(_LAYER) and key.removeprefix(_LAYER).isdecimal()
        }
        step = fields.value(fields.need(entry, "step", f"{where}[{index}]"), f"{where}[{index}].step")
        found.append(Drift(step, fields.value(entry["penalty"], f"{where}[{index}].penalty"), layers))
    return tuple(found)
