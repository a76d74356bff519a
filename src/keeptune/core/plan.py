"""Plan: a method's decisions, target by target, with the factors at the first step."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from torch import Tensor

from keeptune.core.artefact import (
    as_written,
    atomic_directory,
    content_key,
    read_json,
    read_tensors,
    tensor_fingerprint,
    write_json,
    write_tensors,
)
from keeptune.core.errors import ArtefactError, PlanError
from keeptune.core.evidence import bounded
from keeptune.core.low_rank import LowRank, RowSelection
from keeptune.core.target import TRAINED_TENSORS, Target, TensorName

Scope = Literal["adapter", "all"]
# 2 leaves out factors that the rows of a decision imply (RowSelection); the key is of the factors either way.
_FORMAT, _WITH_IMPLIED = 1, 2
_UNNAMED: Mapping[str, object] = {"bias": False, "expert": None, "experts": 1}


@dataclass(frozen=True, slots=True)
class Decision:
    """What a method allots to one target.

    Args:
        rank: 0 leaves the target alone.
        rows: Output nodes the change is confined to (LoKI), ascending; None is all of them.
    """

    rank: int
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class TargetPlan:
    """How one target is trained.

    Args:
        target: The target.
        decision: Its rank and rows.
        init: The factors at the first step, float32; the change that acts is ``scale * (B A)``.
        scale: alpha / rank.
        trainable: Which tensors are trained (:mod:`keeptune.core.target`); the others stay as they are.
        evidence: Name to 1-D tensor: spectra and scores behind the decision, for tables and plots.
        added: ``init`` is added to W at the start, not taken out of it.
        vectors: What a method trains besides A and B, at the first step, float32: ``magnitude`` ``(m,)``, the
            lengths of W's rows (DoRA), or ``bias`` ``(m,)``, with which the change of b is ``scale * bias`` (LoKI).
        kept: Directions of W that stay, orthonormal: ``U`` ``(m, k)`` with ``Uᵀ ΔW = 0``, ``V`` ``(n, k)`` with
            ``ΔW V = 0`` (OPLoRA).
    """

    target: Target
    decision: Decision
    init: LowRank
    scale: float
    trainable: frozenset[TensorName]
    evidence: Mapping[str, Tensor] = field(default_factory=dict)
    added: bool = False
    vectors: Mapping[TensorName, Tensor] = field(default_factory=dict)
    kept: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def start(self) -> dict[TensorName, Tensor]:
        """The tensors at the first step, trained or frozen: A, B and the vectors."""
        return {"A": self.init.A, "B": self.init.B, **self.vectors}

    @property
    def anchored(self) -> bool:
        """Whether ``init`` is taken out of W at the start, so that the model's output does not change."""
        return not self.added and not self.init.is_zero

    @property
    def confined(self) -> frozenset[TensorName]:
        """The trained tensors of which only the decision's rows are trained: those with a row per output."""
        if self.decision.rows is None:
            return frozenset()
        return frozenset(name for name in self.trainable if TRAINED_TENSORS[name].axes.startswith("m"))

    @property
    def held_back(self) -> int:
        """The number of elements of trained tensors that stay as they are: rows other than the decision's."""
        rows = self.target.out_features - len(self.decision.rows or ())
        return sum(rows * self._numel(name) // self.target.out_features for name in self.confined)

    @property
    def trained_parameters(self) -> int:
        """The number of elements that are trained."""
        return sum(map(self._numel, self.trainable)) - self.held_back

    def _numel(self, name: TensorName) -> int:
        return TRAINED_TENSORS[name].numel(self.target, self.decision.rank)


@dataclass(frozen=True, slots=True, eq=False)
class PenaltyPlan:
    """A term of the loss on what is trained (:mod:`keeptune.penalties`), with its weights and curvature by name."""

    name: str
    options: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A method's decisions about a model: saved before training, loaded by every resume.

    Args:
        method: The method's registered name.
        options: The method's options.
        targets: Targets with a rank above 0, in model order.
        scope: ``"adapter"`` trains the targets' factors, ``"all"`` every weight (full fine-tuning).
        peft: Extra ``LoraConfig`` fields, such as ``lora_dropout``.
        training: What the trainer must have, as plain values (:mod:`keeptune.training.attach`).
        penalties: Terms of the loss, the method's own and those of the recipe.
        provenance: Keys of what the plan was made from: model, data, statistics, versions.

    Raises:
        PlanError: An adapter plan has no target, or experts of one parameter differ in what PEFT has one of.
    """

    method: str
    options: Mapping[str, Any]
    targets: tuple[TargetPlan, ...]
    scope: Scope = "adapter"
    peft: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    penalties: tuple[PenaltyPlan, ...] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.scope != "all" and not self.targets:
            raise PlanError(
                f"method {self.method}",
                got="no target with a rank above 0",
                wanted="at least one",
                next_step="Check the recipe's targets and ranks.",
            )
        for parameter, experts in self.experts.items():
            _check_alike(parameter, experts)

    @property
    def experts(self) -> dict[str, list[TargetPlan]]:
        """The planned experts of each parameter that holds several, by the parameter's name."""
        found: dict[str, list[TargetPlan]] = {}
        for t in self.targets:
            if t.target.expert is not None:
                found.setdefault(t.target.parameter, []).append(t)
        return found

    @property
    def key(self) -> str:
        """The plan's content key: equal plans have equal keys, bit for bit."""
        factors = {
            f"{t.target.name}{name}": tensor_fingerprint(value)
            for t in self.targets  # one at a time: what is implied is made here
            for name, value in _tensors(t, implied=True).items()
        }
        factors |= {name: tensor_fingerprint(value) for name, value in self._penalty_tensors().items()}
        return content_key(self._record() | {"factors": factors})

    def __getitem__(self, name: str) -> TargetPlan:
        """Returns the plan of a target, by its name."""
        for target_plan in self.targets:
            if target_plan.target.name == name:
                return target_plan
        raise KeyError(name)

    def summary(self) -> list[dict[str, Any]]:
        """Returns the plan as plain values for a table, one row per target."""
        return [
            {
                "target": t.target.name,
                "layer": t.target.layer,
                "role": t.target.role,
                "shape": [t.target.out_features, t.target.in_features],
                "rank": t.decision.rank,
                **({} if t.decision.rows is None else {"rows": len(t.decision.rows)}),
                "scale": t.scale,
                "trains": sorted(t.trainable),
                "trained_parameters": t.trained_parameters,
                "evidence": bounded(t.evidence),
            }
            for t in self.targets
        ]

    def save(self, folder: Path | str) -> None:
        """Writes ``plan.json`` and the tensors of factors, evidence and penalties, whole or not at all."""
        implied = any(isinstance(t.init, RowSelection) for t in self.targets)
        factors = {f"{t.target.name}{k}": v for t in self.targets for k, v in _tensors(t, implied=False).items()}
        tensors = {
            "factors.safetensors": factors,
            "evidence.safetensors": {f"{t.target.name}:{k}": v for t in self.targets for k, v in t.evidence.items()},
        }
        if self.penalties:
            tensors["penalties.safetensors"] = self._penalty_tensors()
        with atomic_directory(Path(folder)) as fresh:
            files = {name: write_tensors(fresh / name, held) for name, held in tensors.items()}
            version = {"format": _WITH_IMPLIED if implied else _FORMAT}
            write_json(fresh / "plan.json", self._record() | version | {"files": files}, checked=True)

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """Reads a saved plan; ``Plan.load`` after ``save`` is the identity.

        Raises:
            ArtefactError: The folder is not a plan, or is damaged.
        """
        path, again = Path(folder) / "plan.json", "Remove the folder and make the plan again."
        record = read_json(path, again)
        version = record.get("format")
        if version not in (_FORMAT, _WITH_IMPLIED):
            raise ArtefactError(
                str(path),
                got=f"plan format {version}",
                wanted=f"format {_FORMAT} or {_WITH_IMPLIED}",
                next_step="Make the plan again with this version of keeptune.",
            )
        with as_written(path, "a plan as it was saved", again):
            penalties = record.get("penalties", [])
            parts = [f"{part}.safetensors" for part in ("factors", "evidence", *(["penalties"] if penalties else []))]
            factors, evidence, *more = (read_tensors(path.with_name(p), record["files"][p]) for p in parts)
            return cls(
                method=record["method"],
                options=record["options"],
                targets=tuple(_read_target(row, factors, evidence) for row in record["targets"]),
                scope=record["scope"],
                peft=record["peft"],
                training=record["training"],
                penalties=tuple(
                    PenaltyPlan(row["name"], row["options"], _under(more[0], f"{i}:"))
                    for i, row in enumerate(penalties)
                ),
                provenance=record["provenance"],
            )

    def _record(self) -> dict[str, Any]:
        rows = [
            {
                # Named only where they are so: plans of before there was a bias or an expert keep their keys.
                "target": {k: v for k, v in asdict(t.target).items() if v != _UNNAMED.get(k, ...)},
                "decision": t.decision,
                "scale": t.scale,
                "trainable": sorted(t.trainable),
                **({"added": True} if t.added else {}),
            }
            for t in self.targets
        ]
        penalties = [{"name": p.name, "options": dict(p.options)} for p in self.penalties]
        return {
            "format": _FORMAT,
            "method": self.method,
            "options": dict(self.options),
            "scope": self.scope,
            "peft": dict(self.peft),
            "training": dict(self.training),
            "provenance": dict(self.provenance),
            "targets": rows,
            **({"penalties": penalties} if penalties else {}),
        }

    def _penalty_tensors(self) -> dict[str, Tensor]:
        return {f"{i}:{name}": value for i, p in enumerate(self.penalties) for name, value in p.tensors.items()}


def _check_alike(parameter: str, experts: Sequence[TargetPlan]) -> None:
    special = {name for t in experts for name in {*t.trainable, *t.vectors} - {"A", "B"}}
    if special or any(t.decision.rows is not None for t in experts):
        raise PlanError(
            f"experts of {parameter}",
            got=", ".join(sorted(special)) or "single rows",
            wanted="the factors A and B only: PEFT trains nothing else of a parameter that holds several experts",
            next_step="Leave the roles of the experts out of `targets`, or take another method for them.",
        )
    kinds = {(t.scale, t.trainable) for t in experts}
    if len(kinds) > 1:
        scales = sorted({scale for scale, _ in kinds})
        raise PlanError(
            f"experts of {parameter}",
            got=f"scales {', '.join(f'{scale:.4g}' for scale in scales)}"
            if len(scales) > 1
            else "other trained factors",
            wanted="the same for all: PEFT has one scale for a parameter, and freezes its A or B as a whole",
            next_step="Leave `method.alpha` out, so that the scale does not depend on the rank, or take equal ranks.",
        )


def _tensors(t: TargetPlan, *, implied: bool) -> dict[str, Tensor]:
    factors = {} if isinstance(t.init, RowSelection) and not implied else {".B": t.init.B, ".A": t.init.A}
    kept = {f"/{name}": value for name, value in t.kept.items()}
    return factors | kept | {f":{name}": value for name, value in t.vectors.items()}


def _read_target(row: Mapping[str, Any], factors: Mapping[str, Tensor], evidence: Mapping[str, Tensor]) -> TargetPlan:
    target, rows = Target(**row["target"]), row["decision"]["rows"]
    implied = rows is not None and f"{target.name}.B" not in factors
    return TargetPlan(
        target=target,
        decision=Decision(row["decision"]["rank"], tuple(rows) if rows is not None else None),
        init=RowSelection(rows, (target.out_features, target.in_features))
        if implied
        else LowRank(B=factors[f"{target.name}.B"], A=factors[f"{target.name}.A"]),
        scale=row["scale"],
        trainable=frozenset(row["trainable"]),
        evidence=_under(evidence, f"{target.name}:"),
        vectors=_under(factors, f"{target.name}:"),
        kept=_under(factors, f"{target.name}/"),
        added=row.get("added", False),
    )


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
