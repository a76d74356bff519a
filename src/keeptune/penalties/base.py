"""What a penalty is, where penalties are found, and how a plan gets them.

    L = L_task + sum of penalties        each once per optimiser step (training/penalty_engine.py)

A penalty is declared by a frozen dataclass whose fields are its options. It says which statistics it needs, makes
the tensors that training needs (saved with the plan, so that a resumed run goes on with the same ones), and binds
them, target by target, to a :class:`Term`: the value and the gradient in closed form.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import pkgutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

import keeptune.penalties
from keeptune.core.artefact import canonical_json
from keeptune.core.errors import RecipeError, nearest
from keeptune.core.low_rank import LowRank
from keeptune.core.plan import PenaltyPlan, Plan, TargetPlan
from keeptune.core.target import Target
from keeptune.core.trained_tensors import TensorName
from keeptune.statistics.collect import StatsView
from keeptune.statistics.request import DataRole, Request

__all__ = [
    "NORM",
    "Adaptive",
    "Concluding",
    "OnChange",
    "OnFactors",
    "Penalty",
    "PenaltySpec",
    "Remarking",
    "Site",
    "Term",
    "conclusions",
    "notes_of",
    "penalties",
    "penalty_named",
    "penalty_plan",
    "start_of",
]

NORM = "norm"  # ‖W‖ of each target that a penalty holds, which drifts are measured against
Factors = Mapping[TensorName, Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """A target, as a penalty sees it when a plan is made.

    Args:
        plan: How the target is trained.
        weight: W, ``(m, n)``, float32.
        stats: What the penalty requested.
        targets: All targets of the plan.
        blocks: How many blocks the model has.
    """

    plan: TargetPlan
    weight: Tensor
    stats: StatsView
    targets: tuple[Target, ...]
    blocks: int


class Penalty(Protocol):
    """A function of a target's factors ``B (m, r)`` and ``A (r, n)``.

    Law: ``value_and_grad`` gives ``value`` and what autograd gives of it, without an m x n matrix.
    """

    def value(self, delta: LowRank) -> Tensor:
        """Compute it.

        Args:
            delta: The factors in training.

        Returns:
            A scalar.
        """
        ...

    def value_and_grad(self, delta: LowRank) -> tuple[Tensor, LowRank]:
        """Compute it and its gradient.

        Args:
            delta: The factors in training.

        Returns:
            A scalar, and d value / d B with d value / d A.
        """
        ...


class Term(Protocol):
    """A function of all that is trained of a target: ``A``, ``B``, and what a method has besides."""

    def value_and_grad(self, factors: Factors) -> tuple[Tensor, Factors]:
        """Compute it and its gradient.

        Args:
            factors: Factor to value.

        Returns:
            A scalar, and the gradient of those factors that it depends on.
        """
        ...


@dataclass(frozen=True, slots=True, eq=False)
class OnFactors:
    """A penalty on A and B as they are.

    Args:
        penalty: The penalty.
    """

    penalty: Penalty

    def value_and_grad(self, factors: Factors) -> tuple[Tensor, Factors]:
        """Hand A and B over."""
        value, grad = self.penalty.value_and_grad(LowRank(factors["B"], factors["A"]))
        return value, {"A": grad.A, "B": grad.B}


@dataclass(frozen=True, slots=True, eq=False)
class OnChange:
    """A penalty on the weight change, which is ``B A``, or ``B diag(d) A`` where there is a diagonal (KaSA).

    Args:
        penalty: The penalty.
    """

    penalty: Penalty

    def value_and_grad(self, factors: Factors) -> tuple[Tensor, Factors]:
        """Take the diagonal into B; the chain rule takes it out again."""
        B, A, d = factors["B"], factors["A"], factors.get("diag")
        if d is None:
            return OnFactors(self.penalty).value_and_grad(factors)
        value, grad = self.penalty.value_and_grad(LowRank(B * d, A))
        return value, {"A": grad.A, "B": grad.B * d, "diag": (grad.B * B).sum(dim=0)}


class PenaltySpec(Protocol):
    """What a recipe's ``penalties`` names: a frozen dataclass, its fields the options.

    Laws (``tests/contract``): strength 0 is plain training bit for bit; a saved and loaded plan binds to the same
    terms; no term has a value or a gradient where nothing has changed yet, but for one on the factors themselves.
    """

    name: ClassVar[str]
    paper: ClassVar[str]

    @property
    def strength(self) -> float:
        """What the penalty is multiplied by; 0 leaves it out."""
        ...

    @property
    def data(self) -> frozenset[DataRole]:
        """Which data it needs."""
        ...

    def requests(self, target_plan: TargetPlan) -> frozenset[Request]:
        """Say which statistics a target needs.

        Args:
            target_plan: How the target is trained: curvature may be taken at its first factors.

        Returns:
            The requests; empty for a penalty without data.
        """
        ...

    def tensors(self, site: Site) -> Mapping[str, Tensor]:
        """Make what training needs, for one target.

        Args:
            site: The target, its weight and statistics.

        Returns:
            Name to tensor, saved with the plan. Names carry their target, or the input group of targets that share
            one, such as ``"Omega:model.layers.0.mlp.up_proj"``.
        """
        ...

    def bind(self, target_plan: TargetPlan, tensors: Mapping[str, Tensor]) -> Term:
        """Make the penalty of one target.

        Args:
            target_plan: How the target is trained.
            tensors: Those of the whole plan, on the device of the training.

        Returns:
            Its value and gradient.
        """
        ...


@runtime_checkable
class Adaptive(Protocol):
    """A penalty of which some tensors change while training; they are saved with each checkpoint."""

    state: ClassVar[tuple[str, ...]]

    def update(self, tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Change them in place, after each step.

        Args:
            tensors: The penalty's own.
            values: Target to its value in this step.

        Returns:
            Name to scalar: what to log.
        """
        ...


@runtime_checkable
class Concluding(Protocol):
    """A penalty that has something to say when training is over."""

    def conclude(self, tensors: Mapping[str, Tensor], last: Mapping[str, float]) -> list[str]:
        """Say it.

        Args:
            tensors: What the penalty made of the plan.
            last: The last row of the training's log.

        Returns:
            Sentences.
        """
        ...


@runtime_checkable
class Remarking(Protocol):
    """A penalty that has something to say about what it can and cannot hold."""

    def notes(self, plan: Plan, tensors: Mapping[str, Tensor]) -> list[str]:
        """Say it.

        Args:
            plan: What is trained.
            tensors: What the penalty made of it.

        Returns:
            Sentences.
        """
        ...


def penalty_plan(penalty: PenaltySpec, sites: Iterable[Site]) -> PenaltyPlan:
    """Make a penalty's part of a plan.

    Args:
        penalty: The penalty.
        sites: The targets it holds, one at a time.

    Returns:
        Its name, options and tensors.
    """
    tensors: dict[str, Tensor] = {}
    for site in sites:
        tensors |= penalty.tensors(site)
        tensors[f"{NORM}:{site.plan.target.name}"] = torch.linalg.norm(site.weight).cpu()
    return PenaltyPlan(penalty.name, json.loads(canonical_json(penalty)), tensors)


def conclusions(plan: Plan, last: Mapping[str, float]) -> list[str]:
    """Ask the penalties of a plan what there is to say when training is over.

    Args:
        plan: The plan.
        last: The last row of the training's log.

    Returns:
        Sentences, for the report.
    """
    said: list[str] = []
    for made in plan.penalties:
        spec = penalty_named(made.name, made.options)
        if isinstance(spec, Concluding):
            said += spec.conclude(made.tensors, last)
    return said


def start_of(target_plan: TargetPlan, device: torch.device) -> LowRank | None:
    """Give the factors that a change is counted from, with the diagonal taken into B.

    Args:
        target_plan: How the target is trained.
        device: Where they are needed.

    Returns:
        ``B_0`` and ``A_0``; None where their product is zero.
    """
    start, diagonal = target_plan.init, target_plan.vectors.get("diag")
    start = start if diagonal is None else LowRank(start.B * diagonal, start.A)
    return None if start.is_zero else start.to(torch.float32, device)


def notes_of(penalty: PenaltySpec, plan: Plan, made: PenaltyPlan) -> list[str]:
    """Ask a penalty what there is to know about it on a plan.

    Args:
        penalty: The penalty.
        plan: The plan.
        made: The penalty's part of it.

    Returns:
        Sentences, shown with the plan.
    """
    return list(penalty.notes(plan, made.tensors)) if isinstance(penalty, Remarking) else []


def penalties() -> dict[str, type[Any]]:
    """Find every penalty: the files of this package and the entry points ``keeptune.penalties``.

    Returns:
        Name to class, sorted by name.
    """
    names = sorted(info.name for info in pkgutil.iter_modules(keeptune.penalties.__path__) if info.name != "base")
    classes = [
        cls
        for module in (importlib.import_module(f"keeptune.penalties.{name}") for name in names)
        for _, cls in inspect.getmembers(module, inspect.isclass)
        if cls.__module__ == module.__name__ and dataclasses.is_dataclass(cls) and hasattr(cls, "name")
    ]
    classes += [point.load() for point in entry_points(group="keeptune.penalties")]
    return {cls.name: cls for cls in sorted(classes, key=lambda cls: cls.name)}


def penalty_named(name: str, options: Mapping[str, Any]) -> Any:
    """Make a penalty from its name and options.

    Args:
        name: Its registered name, such as ``"l2"``.
        options: Its fields.

    Returns:
        The penalty.

    Raises:
        RecipeError: The name or an option is unknown, or a value does not fit.
    """
    known = penalties()
    if name not in known:
        raise RecipeError("penalties", got=f'"{name}"', wanted="the name of a penalty", next_step=nearest(name, known))
    cls = known[name]
    fields = [field.name for field in dataclasses.fields(cls)]
    for key in options:
        if key not in fields:
            raise RecipeError(
                f"penalties, {name}, key {key}",
                got=f"an option that {name} does not have",
                wanted="one of its options",
                next_step=nearest(key, fields),
            )
    try:
        return TypeAdapter(cls).validate_python(dict(options))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise RecipeError(
            f"penalties, {name}, key {place}",
            got=repr(first["input"]),
            wanted=first["msg"],
            next_step="Correct the value.",
        ) from error
