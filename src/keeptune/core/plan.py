"""Plan: what a method decided, target by target, with the factors training starts from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from keeptune.core.artefact import (
    atomic_directory,
    content_key,
    read_json,
    read_tensors,
    tensor_fingerprint,
    write_json,
    write_tensors,
)
from keeptune.core.errors import ArtefactError, PlanError
from keeptune.core.low_rank import LowRank
from keeptune.core.target import Target

__all__ = ["Decision", "Factor", "PenaltyPlan", "Plan", "Scope", "TargetPlan"]

Factor = Literal["A", "B", "magnitude", "diag", "bias", "U_low", "S_low", "V_low"]
Scope = Literal["adapter", "subspace", "all"]
_FORMAT = 1


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
        trainable: Which factors are trained; the others stay as they are.
        evidence: Name to 1-D tensor: spectra and scores behind the decision, for tables and plots.
        removed: The part of W taken out at the start, without the scale; None takes ``init``, and the model's
            output does not change.
        vectors: What a method trains besides A and B, at the first step, float32: ``magnitude`` ``(m,)``, the
            lengths of W's rows (DoRA), ``diag`` ``(r,)``, with which the change is ``scale * (B diag A)`` (KaSA), or
            ``bias`` ``(m,)``, with which that of b is ``scale * bias`` (LoKI).
    """

    target: Target
    decision: Decision
    init: LowRank
    scale: float
    trainable: frozenset[Factor]
    evidence: Mapping[str, Tensor] = field(default_factory=dict)
    removed: LowRank | None = None
    vectors: Mapping[Factor, Tensor] = field(default_factory=dict)

    @property
    def anchor(self) -> LowRank:
        """What is taken out of W at the start, without the scale: the start itself, unless told otherwise."""
        return self.init if self.removed is None else self.removed

    @property
    def start(self) -> dict[Factor, Tensor]:
        """What is trained, or held beside it, at the first step: A, B and the vectors."""
        return {"A": self.init.A, "B": self.init.B, **self.vectors}

    @property
    def anchored(self) -> bool:
        """True when something is taken out of W at the start."""
        return not self.anchor.is_zero

    @property
    def confined(self) -> frozenset[Factor]:
        """Trained factors with a row per output of which only the decision's rows are trained: B and the bias."""
        return frozenset() if self.decision.rows is None else self.trainable & {"B", "bias"}

    @property
    def held_back(self) -> int:
        """Numbers of trained tensors that stay as they are: the rows that are not the decision's."""
        rest = self.target.out_features - len(self.decision.rows or ())
        return sum(rest * self.start[name].numel() // self.target.out_features for name in self.confined)

    @property
    def trained_parameters(self) -> int:
        """Number of trained numbers; outside the decision's rows nothing is."""
        m, n, r = self.target.out_features, self.target.in_features, self.decision.rank
        sizes = {name: value.numel() for name, value in self.start.items()} | {
            "U_low": m * r,
            "S_low": r,
            "V_low": r * n,
        }
        return sum(sizes[name] for name in self.trainable) - self.held_back


@dataclass(frozen=True, slots=True, eq=False)
class PenaltyPlan:
    """A term of the loss that acts on what is trained (:mod:`keeptune.penalties`).

    Args:
        name: Its registered name.
        options: Its options.
        tensors: What training needs of it: weights and curvature, by name.
    """

    name: str
    options: Mapping[str, Any]
    tensors: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A method's whole decision about a model: saved before training, loaded by every resume.

    Args:
        method: The method's registered name.
        options: The method's options.
        targets: Targets with a rank above 0, in model order.
        scope: ``"adapter"`` trains the targets' factors, ``"subspace"`` their weights but for the top singular
            directions (OSF), ``"all"`` every weight (full fine-tuning).
        peft: Extra ``LoraConfig`` fields, such as ``lora_dropout``.
        training: What the method asks of the trainer, as plain values: an ``optimizer``
            (:mod:`keeptune.training.attach`).
        penalties: Terms of the loss, the method's own and those of the recipe.
        provenance: Keys of what the plan was made from: model, data, statistics, versions.
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
        """Check that an adapter plan has something to train.

        Raises:
            PlanError: There is no target.
        """
        if self.scope != "all" and not self.targets:
            raise PlanError(
                f"method {self.method}",
                got="no target with a rank above 0",
                wanted="at least one",
                next_step="Check the recipe's targets and ranks.",
            )

    @property
    def key(self) -> str:
        """The plan's content key: equal plans have equal keys, bit for bit."""
        return content_key(self._record() | {"factors": self._fingerprints()})

    def __getitem__(self, name: str) -> TargetPlan:
        """Look a target's plan up by module name.

        Args:
            name: ``"model.layers.0.self_attn.q_proj"``.

        Returns:
            Its plan.

        Raises:
            KeyError: The target is not in the plan.
        """
        for target_plan in self.targets:
            if target_plan.target.name == name:
                return target_plan
        raise KeyError(name)

    def summary(self) -> list[dict[str, Any]]:
        """Tell the plan as rows for a table.

        Returns:
            One row per target: target, layer, role, shape, rank, scale, trained parameters, evidence.
        """
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
                "evidence": {name: value.tolist() for name, value in t.evidence.items()},
            }
            for t in self.targets
        ]

    def diff(self, other: Plan) -> list[str]:
        """Say where two plans differ.

        Args:
            other: The plan to compare with.

        Returns:
            One line per difference; empty when the plans are equal.
        """
        lines = []
        if self.method != other.method or dict(self.options) != dict(other.options):
            lines.append(f"method: {self.method} {dict(self.options)} | {other.method} {dict(other.options)}")
        if dict(self.training) != dict(other.training):
            lines.append(f"training: {dict(self.training)} | {dict(other.training)}")
        terms = [[f"{p.name} {dict(p.options)}" for p in plan.penalties] for plan in (self, other)]
        if terms[0] != terms[1]:
            lines.append(f"penalties: {'; '.join(terms[0]) or 'none'} | {'; '.join(terms[1]) or 'none'}")
        elif _prints(self.penalties) != _prints(other.penalties):
            lines.append("penalties: same options, another curvature or weight")
        mine = {t.target.name: t for t in self.targets}
        theirs = {t.target.name: t for t in other.targets}
        for name in sorted(mine.keys() | theirs.keys()):
            a, b = mine.get(name), theirs.get(name)
            if a is None or b is None:
                lines.append(f"{name}: only in the {'second' if a is None else 'first'} plan")
            elif a.init.shape != b.init.shape:
                sizes = [" x ".join(map(str, t.init.shape)) for t in (a, b)]
                lines.append(f"{name}: {sizes[0]} | {sizes[1]}")
            elif (a.decision, a.scale, a.trainable) != (b.decision, b.scale, b.trainable):
                trains = [" ".join(sorted(t.trainable)) for t in (a, b)]
                others = len(set(a.decision.rows or ()) ^ set(b.decision.rows or ()))
                lines.append(
                    f"{name}: rank {a.decision.rank} | {b.decision.rank}, scale {a.scale} | {b.scale}, "
                    f"trains {trains[0]} | {trains[1]}" + (f", {others} rows of only one" if others else "")
                )
            elif not (torch.equal(a.init.B, b.init.B) and torch.equal(a.init.A, b.init.A)):
                lines.append(f"{name}: same rank, starting change differs by {_gap(a.init, b.init):.2e} (relative)")
            elif not (torch.equal(a.anchor.B, b.anchor.B) and torch.equal(a.anchor.A, b.anchor.A)):
                lines.append(f"{name}: same start, taken out of W differs by {_gap(a.anchor, b.anchor):.2e} (relative)")
            elif not _equal(a.vectors, b.vectors):
                lines.append(f"{name}: same factors, another start of {', '.join(sorted({*a.vectors, *b.vectors}))}")
        return lines

    def save(self, folder: Path | str) -> None:
        """Write ``plan.json`` and the tensors of factors, evidence and penalties, whole or not at all.

        Args:
            folder: Where; a folder there is replaced.
        """
        with atomic_directory(Path(folder)) as fresh:
            factors = {f"{t.target.name}{k}": v for t in self.targets for k, v in _factors(t).items()}
            evidence = {f"{t.target.name}:{k}": v for t in self.targets for k, v in t.evidence.items()}
            files = {
                "factors.safetensors": write_tensors(fresh / "factors.safetensors", factors),
                "evidence.safetensors": write_tensors(fresh / "evidence.safetensors", evidence),
            }
            if self.penalties:
                held = {f"{i}:{k}": v for i, p in enumerate(self.penalties) for k, v in p.tensors.items()}
                files["penalties.safetensors"] = write_tensors(fresh / "penalties.safetensors", held)
            write_json(fresh / "plan.json", self._record() | {"files": files})

    @classmethod
    def load(cls, folder: Path | str) -> Plan:
        """Read a saved plan; ``Plan.load`` after ``save`` is the identity.

        Args:
            folder: A folder that :meth:`save` wrote.

        Returns:
            The plan.

        Raises:
            ArtefactError: The folder is not a plan, or is damaged.
        """
        folder = Path(folder)
        record = read_json(folder / "plan.json")
        found = record.get("format") if isinstance(record, dict) else None
        if found != _FORMAT:
            raise ArtefactError(
                str(folder),
                got=f"plan format {found}",
                wanted=f"format {_FORMAT}",
                next_step="Make the plan again with this version of keeptune.",
            )
        try:
            files = record["files"]
            factors = read_tensors(folder / "factors.safetensors", files["factors.safetensors"])
            evidence = read_tensors(folder / "evidence.safetensors", files["evidence.safetensors"])
            penalties = record.get("penalties", [])
            held = read_tensors(folder / "penalties.safetensors", files["penalties.safetensors"]) if penalties else {}
            return cls(
                method=record["method"],
                options=record["options"],
                targets=tuple(_load_target(row, factors, evidence) for row in record["targets"]),
                scope=record["scope"],
                peft=record["peft"],
                training=record["training"],
                penalties=tuple(
                    PenaltyPlan(row["name"], row["options"], _named(held, f"{i}:")) for i, row in enumerate(penalties)
                ),
                provenance=record["provenance"],
            )
        except (KeyError, TypeError) as error:
            raise ArtefactError(
                str(folder / "plan.json"),
                got=f"{type(error).__name__}: {error}",
                wanted="a plan as it was saved",
                next_step="Remove the folder and make the plan again.",
            ) from error

    def _record(self) -> dict[str, Any]:
        rows = [
            {
                # Named only where it is so: plans of before there was a bias keep their keys.
                "target": {k: v for k, v in asdict(t.target).items() if k != "bias" or v},
                "decision": t.decision,
                "scale": t.scale,
                "trainable": sorted(t.trainable),
            }
            for t in self.targets
        ]
        return {
            "format": _FORMAT,
            "method": self.method,
            "options": dict(self.options),
            "scope": self.scope,
            "peft": dict(self.peft),
            "training": dict(self.training),
            "provenance": dict(self.provenance),
            "targets": rows,
        } | (
            {"penalties": [{"name": p.name, "options": dict(p.options)} for p in self.penalties]}
            if self.penalties
            else {}
        )

    def _fingerprints(self) -> dict[str, str]:
        return {
            f"{t.target.name}{name}": tensor_fingerprint(value)
            for t in self.targets
            for name, value in _factors(t).items()
        } | _prints(self.penalties)


def _prints(penalties: tuple[PenaltyPlan, ...]) -> dict[str, str]:
    return {f"{i}:{k}": tensor_fingerprint(v) for i, p in enumerate(penalties) for k, v in p.tensors.items()}


def _gap(a: LowRank, b: LowRank) -> float:
    return float(a.minus(b).norm_squared().sqrt() / b.norm_squared().sqrt().clamp_min(1e-30))


def _equal(a: Mapping[Factor, Tensor], b: Mapping[Factor, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def _factors(target_plan: TargetPlan) -> dict[str, Tensor]:
    found = {".B": target_plan.init.B, ".A": target_plan.init.A}
    if target_plan.removed is not None:
        found |= {".removed.B": target_plan.removed.B, ".removed.A": target_plan.removed.A}
    return found | {f":{name}": value for name, value in target_plan.vectors.items()}


def _load_target(row: Mapping[str, Any], factors: Mapping[str, Tensor], evidence: Mapping[str, Tensor]) -> TargetPlan:
    target = Target(**row["target"])
    rows = row["decision"]["rows"]
    removed = None
    if f"{target.name}.removed.B" in factors:
        removed = LowRank(B=factors[f"{target.name}.removed.B"], A=factors[f"{target.name}.removed.A"])
    return TargetPlan(
        target=target,
        decision=Decision(row["decision"]["rank"], tuple(rows) if rows is not None else None),
        init=LowRank(B=factors[f"{target.name}.B"], A=factors[f"{target.name}.A"]),
        removed=removed,
        scale=row["scale"],
        trainable=frozenset(row["trainable"]),
        evidence=_named(evidence, f"{target.name}:"),
        vectors=cast("dict[Factor, Tensor]", _named(factors, f"{target.name}:")),
    )


def _named(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
