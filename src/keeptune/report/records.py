"""``report.json`` as typed records; errors name the place of a key that is missing or has the wrong kind of value."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    model_validator,
)

from keeptune.core.errors import ArtefactError
from keeptune.core.intervals import lower_is_better

_LAYER: Final = "drift/layer_"
T = TypeVar("T")


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _not_text(value: object) -> object:
    if isinstance(value, bool | str):
        raise ValueError("Input should be a whole number")
    return value


def _curves(value: object) -> object:
    """Keeps lists of numbers, and curves of which there are some points; drops the rest."""
    if not isinstance(value, Mapping):
        return value or {}
    lists = {str(key): {"values": own} for key, own in value.items() if isinstance(own, list | tuple) and own}
    whole = {key: own for key, own in lists.items() if not isinstance(own["values"][0], list | tuple | str | Mapping)}
    return whole | {str(key): own for key, own in value.items() if isinstance(own, Mapping) and "at" in own}


# Null is NaN in a number, None in a score, empty in a list or a mapping.
Number = Annotated[float, Strict(), BeforeValidator(lambda value: math.nan if value is None else value)]
Score = Annotated[Annotated[float, Strict()] | None, AfterValidator(_finite)]
Whole = Annotated[int, BeforeValidator(_not_text)]
Text = Annotated[str, BeforeValidator(lambda value: "" if value is None else str(value))]
Many = Annotated[tuple[T, ...], BeforeValidator(lambda value: () if value is None else value)]
Named = Annotated[dict[str, T], BeforeValidator(lambda value: {} if value is None else value)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Group(_Record):
    """The scores on one group (relation) of a benchmark."""

    n: Whole
    before: Number
    after: Number


class Benchmark(_Record):
    """One benchmark of one run, before and after training; the interval is of after - before."""

    name: Text
    role: Literal["knowledge", "task"]
    metric: Text = "exact_match"
    n: Whole
    before: Number
    after: Number
    interval: Annotated[tuple[Number, Number], BeforeValidator(lambda value: (None, None) if value is None else value)]
    kl: Score = Field(default=None, alias="kl_to_base")
    groups: Named[Group] = {}
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

    Args:
        values: The numbers.
        at: Their places; of means, where each range begins.
        size: How many numbers the whole has.
        ranges: Whether the numbers are means.
    """

    values: tuple[Number, ...] = ()
    at: tuple[int, ...] = ()
    size: Whole = 0
    ranges: bool = False

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, value: Any) -> Any:
        """Numbers the values of a whole curve, and takes means for values."""
        if not isinstance(value, Mapping):
            return value
        if "at" not in value:
            size = len(value.get("values", ()))
            return {**value, "at": range(size), "size": size}
        return {**value, "values": value["means"], "ranges": True} if "means" in value else value

    @model_validator(mode="after")
    def _fits(self) -> Curve:
        if len(self.at) != len(self.values) or any(place >= self.size for place in self.at[-1:]):
            raise ValueError(f"a curve of {self.size} with {len(self.at)} places and {len(self.values)} values")
        return self


class PlanRow(_Record):
    """What a method decided for one weight matrix; evidence that holds no numbers is left out."""

    target: Text = ""
    layer: Whole | None = None
    given_role: Text = Field(default="", alias="role")
    rank: Whole | None = None
    evidence: Annotated[dict[str, Curve], BeforeValidator(_curves)] = {}

    @property
    def role(self) -> str:
        """The role, else the last part of the target's name."""
        return self.given_role or self.target.rsplit(".", 1)[-1] or "?"

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
    layers: dict[int, Number] = {}

    @model_validator(mode="before")
    @classmethod
    def _gather_layers(cls, value: Any) -> Any:
        """Gathers the layers' drifts; what is outside any block has layer -1 and is left out."""
        if not isinstance(value, Mapping):
            return value
        drifts = {key.removeprefix(_LAYER): one for key, one in value.items() if key.startswith(_LAYER)}
        return {**value, "layers": {int(key): one for key, one in drifts.items() if key.isdecimal()}}


class Run(_Record):
    """One method trained with one seed."""

    name: Text
    given_label: Text = Field(default="", alias="label")
    seed: Whole
    K: Score
    T: Score
    KT: Score
    adapter: Text
    export_gap: Score
    options: Named[Any] = {}
    trained_parameters: Whole | None = None
    seconds: Annotated[
        Named[Number], AfterValidator(lambda times: {key: one for key, one in times.items() if math.isfinite(one)})
    ] = {}
    steps: Many[Step] = Field(default=(), alias="loss")
    plan: Many[PlanRow] = ()
    notes: Many[Text] = ()
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

    base: Text
    runs: tuple[Run, ...] = Field(alias="methods")
    version: str | None = None
    created: str | None = None


ReportLike = Mapping[str, Any] | Report


def as_report(report: ReportLike) -> Report:
    """Returns a report as it is, or parsed from the mapping read from ``report.json``."""
    return report if isinstance(report, Report) else parse_report(report)


def parse_report(raw: Mapping[str, Any]) -> Report:
    """Returns the content of a ``report.json``, checked and typed.

    Runs that repeat a label and a seed get a numbered label, such as "lora (2)".

    Raises:
        ArtefactError: A required key is missing or has the wrong kind of value.
    """
    try:
        report = Report.model_validate(raw)
    except ValidationError as error:
        raise _refused(error) from error
    seen: dict[tuple[str, int], int] = {}
    runs = []
    for run in report.runs:
        count = seen[run.label, run.seed] = seen.get((run.label, run.seed), 0) + 1
        runs.append(run if count == 1 else run.model_copy(update={"given_label": f"{run.label} ({count})"}))
    return report.model_copy(update={"runs": tuple(runs)})


def _refused(error: ValidationError) -> ArtefactError:
    first = error.errors(include_url=False)[0]
    *path, last = first["loc"] or ("",)
    missing = first["type"] == "missing" and isinstance(last, str)
    names = path if missing else [*path, last]
    place = "".join(f"[{name}]" if isinstance(name, int) else f".{name}" for name in names).lstrip(".")
    return ArtefactError(
        f"report.json: {place}" if place else "report.json",
        got=f'no key "{last}"' if missing else repr(first["input"])[:80],
        wanted=f'the key "{last}"' if missing else first["msg"],
        next_step="Run the comparison again, or correct the file by hand.",
    )
