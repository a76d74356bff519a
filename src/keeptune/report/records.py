"""``report.json`` as typed records; errors name the place of a key that is missing or has the wrong kind of value."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    StrictInt,
    ValidationError,
    model_validator,
)

from keeptune.core.errors import ArtefactError
from keeptune.core.intervals import lower_is_better

_LAYER: Final = "drift/layer_"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _known(times: Mapping[str, float | None]) -> dict[str, float]:
    return {stage: seconds for stage, seconds in times.items() if seconds is not None}


# Null is NaN in a number, None in a score.
Number = Annotated[float, Strict(), BeforeValidator(lambda value: math.nan if value is None else value)]
Score = Annotated[Annotated[float, Strict()] | None, AfterValidator(_finite)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Group(_Record):
    """The scores on one group (relation) of a benchmark."""

    n: StrictInt
    before: Number
    after: Number


class Benchmark(_Record):
    """One benchmark of one run, before and after training; the interval is of after - before."""

    name: str
    role: Literal["knowledge", "task"]
    metric: str = "exact_match"
    n: StrictInt
    before: Number
    after: Number
    interval: Annotated[tuple[Number, Number], BeforeValidator(lambda value: (None, None) if value is None else value)]
    kl: Score = Field(default=None, alias="kl_to_base")
    groups: dict[str, Group] = {}
    chat: bool = False

    @property
    def low(self) -> float:
        """Lower end of the interval; NaN where there is none."""
        return self.interval[0]

    @property
    def high(self) -> float:
        """Upper end of the interval; NaN where there is none."""
        return self.interval[1]

    @property
    def lower_is_better(self) -> bool:
        """Whether a smaller value is the better one."""
        return lower_is_better(self.metric)


class Curve(_Record):
    """Numbers behind a decision, all of them or some: points of a curve, or means over ranges of it.

    They are ``at`` places, of means where each range begins, of a whole of ``size`` numbers.
    """

    values: tuple[Number, ...] = Field(default=(), validation_alias=AliasChoices("values", "means"))
    at: tuple[int, ...] = ()
    size: StrictInt = 0

    @model_validator(mode="before")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        """Numbers the values of a whole curve, which is a list."""
        return {"values": value, "at": range(len(value)), "size": len(value)} if isinstance(value, list) else value

    @model_validator(mode="after")
    def _fits(self) -> Curve:
        if len(self.at) != len(self.values):
            raise ValueError(f"a curve with {len(self.at)} places and {len(self.values)} values")
        return self


class PlanRow(_Record):
    """What a method decided for one weight matrix."""

    layer: StrictInt
    role: str
    rank: StrictInt | None = None
    evidence: dict[str, Curve] = {}

    @property
    def importance(self) -> float | None:
        """The importance the rank rests on; None where the method weighs no importances."""
        values = self.curve("importance").values
        return _finite(values[0]) if len(values) == 1 else None

    def curve(self, name: str) -> Curve:
        """Returns evidence by name; an empty curve where there is none."""
        return self.evidence.get(name, Curve())


class Step(_Record):
    """A step of training; with a penalty also what it cost, and how far each layer was from its start."""

    step: Number
    loss: Number
    nll: Number | None = None
    penalty: Number | None = None
    kl_to_base: Number | None = None
    kl_held_out: Number | None = None
    kl_budget: Number | None = None
    model_config = ConfigDict(frozen=True, extra="allow")

    @property
    def layers(self) -> dict[int, float]:
        """How far each layer was from its start, without what is outside any block (layer -1)."""
        drifts = {key.removeprefix(_LAYER): one for key, one in (self.model_extra or {}).items() if _LAYER in key}
        return {int(key): one for key, one in drifts.items() if key.isdecimal()}


class Run(_Record):
    """One method trained with one seed."""

    name: str
    given_label: str | None = Field(default=None, alias="label")
    seed: StrictInt
    K: Score
    T: Score
    KT: Score
    adapter: str
    export_gap: Score
    options: dict[str, Any] = {}
    trained_parameters: StrictInt | None = None
    seconds: Annotated[dict[str, float], BeforeValidator(_known)] = {}
    steps: tuple[Step, ...] = Field(default=(), alias="loss")
    plan: tuple[PlanRow, ...] = ()
    notes: tuple[str, ...] = ()
    benchmarks: tuple[Benchmark, ...]

    @property
    def label(self) -> str:
        """What the run is compared as: its label, else its name."""
        return self.given_label or self.name

    @property
    def loss(self) -> tuple[tuple[float, float], ...]:
        """Steps with their nats per token whatever the loss, of a classifier its loss; those that are finite."""
        points = ((one.step, one.loss if one.nll is None else one.nll) for one in self.steps)
        return tuple(point for point in points if math.isfinite(sum(point)))

    @property
    def penalised(self) -> tuple[Step, ...]:
        """The steps that have a penalty."""
        return tuple(one for one in self.steps if one.penalty is not None)

    @property
    def average_forgetting(self) -> float | None:
        """The mean relative drop on the knowledge benchmarks, 1 - K (LoKI's Avg)."""
        return None if self.K is None else 1.0 - self.K


class Report(_Record):
    """A whole report: the base model and every run."""

    base: str
    runs: tuple[Run, ...] = Field(alias="methods")
    version: str | None = None
    created: str | None = None


ReportLike = Mapping[str, Any] | Report


def as_report(report: ReportLike) -> Report:
    """Returns a report as it is, or the content of a ``report.json``, checked and typed.

    Runs that repeat a label and a seed get a numbered label, such as "lora (2)".

    Raises:
        ArtefactError: A required key is missing or has the wrong kind of value.
    """
    if isinstance(report, Report):
        return report
    try:
        parsed = Report.model_validate(report)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise ArtefactError(
            f"report.json, {'.'.join(map(str, first['loc']))}",
            got="nothing" if first["type"] == "missing" else repr(first["input"])[:80],
            wanted=first["msg"],
            next_step="Run the comparison again, or correct the file by hand.",
        ) from error
    seen: Counter[tuple[str, int]] = Counter()
    runs = []
    for run in parsed.runs:
        seen[run.label, run.seed] += 1
        count = seen[run.label, run.seed]
        runs.append(run if count == 1 else run.model_copy(update={"given_label": f"{run.label} ({count})"}))
    return parsed.model_copy(update={"runs": tuple(runs)})
