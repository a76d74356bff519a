"""``report.json`` as typed records; errors name the key that is missing or has the wrong kind of value."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NoReturn

from keeptune.core.errors import ArtefactError
from keeptune.core.intervals import lower_is_better

__all__ = ["Benchmark", "Drift", "Group", "PlanRow", "Report", "ReportLike", "Run", "as_report", "parse_report"]

_LAYER: Final = "drift/layer_"


@dataclass(frozen=True)
class Group:
    """The scores on one group (relation) of a benchmark."""

    n: int
    before: float
    after: float


@dataclass(frozen=True)
class Benchmark:
    """One benchmark of one run, before and after training; ``low`` and ``high`` are of after - before."""

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
        """Whether a smaller value is the better one."""
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
        """The importance the rank rests on; None where the method weighs no importances."""
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
        """The mean relative drop on the knowledge benchmarks, 1 - K (LoKI's Avg)."""
        return None if self.K is None else 1.0 - self.K


@dataclass(frozen=True)
class Report:
    """A whole report: the base model and every run."""

    base: str
    runs: tuple[Run, ...]
    version: str | None
    created: str | None


ReportLike = Mapping[str, Any] | Report


def as_report(report: ReportLike) -> Report:
    """Returns a report as it is, or parsed from the mapping read from ``report.json``."""
    return report if isinstance(report, Report) else parse_report(report)


def parse_report(raw: Mapping[str, Any]) -> Report:
    """Returns the content of a ``report.json``, checked and typed.

    Args:
        raw: The mapping read from the file.

    Returns:
        The report; runs that repeat a label and a seed get a numbered label, such as "lora (2)".

    Raises:
        ArtefactError: A required key is missing or has the wrong kind of value.
    """
    top = _Entry(raw, "report.json")
    seen: dict[tuple[str, int], int] = {}
    runs = []
    for run in map(_run, top.entries("methods", needed=True, place="report.json: methods")):
        count = seen[run.label, run.seed] = seen.get((run.label, run.seed), 0) + 1
        runs.append(run if count == 1 else replace(run, label=f"{run.label} ({count})"))
    return Report(str(top.need("base")), tuple(runs), top.text("version"), top.text("created"))


class _Entry:
    """A mapping in the file; its readers raise an ArtefactError that names the place of a wrong value."""

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, Mapping):
            _fail(where, type(value).__name__, "a mapping")
        self.values: Mapping[str, Any] = value
        self.where = where

    def need(self, key: str) -> Any:
        if key not in self.values:
            _fail(self.where, f'no key "{key}"', f'the key "{key}"')
        return self.values[key]

    def text(self, key: str) -> str | None:
        value = self.values.get(key)
        return None if value is None else str(value)

    def number(self, key: str) -> float:
        """Returns a number; null becomes NaN."""
        return _number(self.need(key), f"{self.where}.{key}")

    def score(self, key: str, *, needed: bool = True) -> float | None:
        """Returns a number, or None when it is null, not finite, or missing where it need not be there."""
        value = _number(self.need(key) if needed else self.values.get(key), f"{self.where}.{key}")
        return value if math.isfinite(value) else None

    def whole(self, key: str) -> int:
        value = self.number(key)
        if not math.isfinite(value) or value != int(value):
            _fail(f"{self.where}.{key}", f"{self.values[key]!r}", "a whole number")
        return int(value)

    def maybe_whole(self, key: str) -> int | None:
        return None if self.values.get(key) is None else self.whole(key)

    def entry(self, key: str) -> _Entry:
        """Returns a mapping, empty where there is none."""
        return _Entry(self.values.get(key) or {}, f"{self.where}.{key}")

    def list(self, key: str, *, needed: bool = False, place: str = "") -> Sequence[Any]:
        value, where = self.need(key) if needed else self.values.get(key) or [], place or f"{self.where}.{key}"
        if not isinstance(value, list | tuple):
            _fail(where, type(value).__name__, "a list")
        return value

    def entries(self, key: str, *, needed: bool = False, place: str = "") -> Sequence[_Entry]:
        where = place or f"{self.where}.{key}"
        items = self.list(key, needed=needed, place=place)
        return [_Entry(item, f"{where}[{index}]") for index, item in enumerate(items)]


def _number(value: object, where: str) -> float:
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        _fail(where, f"{value!r}", "a number")
    return float(value)


def _fail(where: str, got: str, wanted: str) -> NoReturn:
    step = "Run the comparison again, or correct the file by hand."
    raise ArtefactError(where, got=got, wanted=wanted, next_step=step)


def _run(entry: _Entry) -> Run:
    name = str(entry.need("name"))
    seconds = entry.entry("seconds")
    times = {str(key): _number(value, f"{seconds.where}.{key}") for key, value in seconds.values.items()}
    steps = entry.entries("loss")
    return Run(
        name=name,
        label=str(entry.values.get("label") or name),
        seed=entry.whole("seed"),
        K=entry.score("K"),
        T=entry.score("T"),
        KT=entry.score("KT"),
        adapter=str(entry.need("adapter")),
        export_gap=entry.score("export_gap"),
        options=entry.entry("options").values,
        trained_parameters=entry.maybe_whole("trained_parameters"),
        seconds={key: value for key, value in times.items() if math.isfinite(value)},
        loss=tuple(
            pair for step in steps if all(map(math.isfinite, pair := (step.number("step"), step.number("loss"))))
        ),
        drift=tuple(_drift(step) for step in steps if "penalty" in step.values),
        plan=tuple(map(_plan_row, entry.entries("plan"))),
        notes=tuple(map(str, entry.list("notes"))),
        benchmarks=tuple(map(_benchmark, entry.entries("benchmarks", needed=True))),
    )


def _benchmark(entry: _Entry) -> Benchmark:
    role = str(entry.need("role"))
    if role not in ("knowledge", "task"):
        _fail(f"{entry.where}.role", f'"{role}"', '"knowledge" or "task"')
    pair = [None, None] if entry.need("interval") is None else entry.list("interval")
    if len(pair) != 2:
        _fail(f"{entry.where}.interval", f"{len(pair)} values", "two: low and high")
    groups = entry.entry("groups")
    each = {str(key): _Entry(value, f"{groups.where}.{key}") for key, value in groups.values.items()}
    return Benchmark(
        name=str(entry.need("name")),
        role=role,
        metric=entry.text("metric") or "exact_match",
        n=entry.whole("n"),
        before=entry.number("before"),
        after=entry.number("after"),
        low=_number(pair[0], f"{entry.where}.interval[0]"),
        high=_number(pair[1], f"{entry.where}.interval[1]"),
        kl=entry.score("kl_to_base", needed=False),
        groups={key: Group(one.whole("n"), one.number("before"), one.number("after")) for key, one in each.items()},
    )


def _plan_row(entry: _Entry) -> PlanRow:
    """Returns a row of a plan; evidence that is not a list of numbers is left out."""
    target = entry.text("target") or ""
    evidence = entry.entry("evidence")
    numbers = {
        str(key): tuple(_number(number, f"{evidence.where}.{key}") for number in values)
        for key, values in evidence.values.items()
        if isinstance(values, list | tuple) and values and not isinstance(values[0], list | tuple | str | Mapping)
    }
    role = entry.text("role") or target.rsplit(".", 1)[-1] or "?"
    return PlanRow(target, entry.maybe_whole("layer"), role, entry.maybe_whole("rank"), numbers)


def _drift(step: _Entry) -> Drift:
    """Returns what a step tells of penalties; what is outside any block has layer -1 and is left out."""
    names = [key for key in step.values if key.startswith(_LAYER) and key.removeprefix(_LAYER).isdecimal()]
    layers = {int(key.removeprefix(_LAYER)): step.number(key) for key in names}
    return Drift(step.number("step"), step.number("penalty"), layers)
