"""The base class of penalties, the list of all penalties, and how a plan gets them.

    L = L_task + sum of penalties        each once per optimiser step (training/penalty_engine.py)

A penalty is a frozen dataclass whose fields are its options, in one file of this package or of another package under
the entry-point group ``keeptune.penalties``. It requests statistics, computes the tensors that training needs (saved
with the plan, so that a resumed run goes on with the same ones), and binds them, target by target, to a ``Term``: the
value and the gradient in closed form.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

import keeptune.penalties
from keeptune.core.artefact import canonical_json
from keeptune.core.low_rank import LowRank
from keeptune.core.options import Options
from keeptune.core.plan import PenaltyPlan, Plan, TargetPlan
from keeptune.core.processes import divided_in_groups
from keeptune.core.registry import made, registered
from keeptune.core.target import Target, TensorName
from keeptune.statistics.collect import StatsView
from keeptune.statistics.request import DataRole, Request

NORM = "norm"  # ‖W‖ of each target that a penalty holds, which drifts are measured against
Factors = Mapping[TensorName, Tensor]
# All that is trained of a target, to the value and the gradient of those factors that it depends on.
Term = Callable[[Factors], tuple[Tensor, Factors]]
# B (m, r) and A (r, n), to the value and what autograd gives of it, without an m x n matrix.
Form = Callable[[LowRank], tuple[Tensor, LowRank]]


@dataclass(frozen=True, slots=True, eq=False)
class Site:
    """A target, as a penalty sees it when a plan is made.

    Args:
        plan: How the target is trained.
        weight: W, ``(m, n)``, float32.
        stats: What the penalty requested.
        targets: All targets that the penalty holds.
        blocks: How many blocks the model has.
    """

    plan: TargetPlan
    weight: Tensor
    stats: StatsView
    targets: tuple[Target, ...]
    blocks: int


def on_factors(form: Form) -> Term:
    """Returns the term of a form in A and B."""

    def term(factors: Factors) -> tuple[Tensor, Factors]:
        value, grad = form(LowRank(factors["B"], factors["A"]))
        return value, {"A": grad.A, "B": grad.B}

    return term


@dataclass(frozen=True)
class Penalty(Options):
    """A term of the loss on what is trained. The defaults need nothing, hold nothing and report nothing.

    Laws (``tests/contract``): strength 0 is plain training bit for bit; a saved and loaded plan binds to the same
    terms; no term has a value or a gradient where nothing has changed yet, but for one on the factors themselves.

    Attributes:
        name: Its registered name.
        paper: Its source.
        state: Names of the tensors that :meth:`update` changes; they are saved with each checkpoint.
        once: Whether a plan may have it only once, since its logs and conclusions have its name.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    state: ClassVar[tuple[str, ...]] = ()
    once: ClassVar[bool] = False

    @property
    def strength(self) -> float:
        """The factor of the penalty, an option of most; 0 leaves the penalty out."""
        return 1.0

    @property
    def data(self) -> frozenset[DataRole]:
        """The data that it needs."""
        return frozenset()

    def place(self, option: str) -> str:
        """Returns ``"penalty l2, strength"`` for ``"strength"``."""
        return f"penalty {self.name}, {option}"

    def requests(self, target_plan: TargetPlan) -> frozenset[Request]:
        """Returns the statistics that a target needs; curvature may be taken at its first factors.

        Returns:
            The requests; empty for a penalty without data.
        """
        return frozenset()

    def tensors(self, site: Site) -> Mapping[str, Tensor]:
        """Computes what training needs, for one target.

        Returns:
            Name to tensor, saved with the plan. Names carry their target, or the input group of targets that share
            one, such as ``"Omega:model.layers.0.mlp.up_proj"``.
        """
        return {}

    def size(self, target_plan: TargetPlan) -> Mapping[str, int]:
        """Returns the bytes of the matrices of :meth:`tensors` before there are any, by the start of their names.

        Law: they are those of the plan, each name once (``tests/contract``).
        """
        return {}

    def bind(self, target_plan: TargetPlan, tensors: Mapping[str, Tensor]) -> Term | None:
        """Returns the penalty's term of one target, given the tensors of the whole plan on the device of the training.

        Returns:
            Its value and gradient; None for a penalty on the whole model.
        """
        return None

    def update(self, tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Changes the tensors of ``state`` in place, after a step in which targets had these values; returns a log."""
        return {}

    def notes(self, plan: Plan, tensors: Mapping[str, Tensor]) -> list[str]:
        """Returns sentences about what it can and cannot hold, shown with the plan."""
        return []

    def conclude(self, tensors: Mapping[str, Tensor], last: Mapping[str, float]) -> list[str]:
        """Returns sentences about the finished training for the report, given the last row of its log."""
        return []


def penalty_plan(penalty: Penalty, targets: Sequence[TargetPlan], site_of: Callable[[TargetPlan], Site]) -> PenaltyPlan:
    """Returns a penalty's part of a plan; several processes divide the targets."""

    def tensors_of(target_plan: TargetPlan) -> Mapping[str, Tensor]:
        site = site_of(target_plan)
        norm = torch.linalg.norm(site.weight).cpu()
        return {**penalty.tensors(site), f"{NORM}:{target_plan.target.name}": norm}

    title = f"plan: {penalty.name}"
    parts = divided_in_groups(targets, lambda t: t.target.input_group, tensors_of, title=title)
    tensors = {name: value for part in parts for name, value in part.items()}
    return PenaltyPlan(penalty.name, json.loads(canonical_json(penalty)), tensors)


def conclusions(plan: Plan, last: Mapping[str, float]) -> list[str]:
    """Returns what the penalties of a plan report when training is over."""
    own = [(penalty_named(made.name, made.options), made.tensors) for made in plan.penalties]
    return [sentence for penalty, tensors in own for sentence in penalty.conclude(tensors, last)]


def start_of(target_plan: TargetPlan, device: torch.device) -> LowRank | None:
    """Returns the factors that a change is counted from, ``B_0`` and ``A_0``; None where their product is zero."""
    start = target_plan.init
    return None if start.is_zero else start.to(torch.float32, device)


def penalties() -> dict[str, type[Any]]:
    """Returns every penalty: this package's and those of entry points; a RecipeError says that two share a name."""
    return registered(keeptune.penalties, Penalty, "penalty")


def penalty_named(name: str, options: Mapping[str, Any]) -> Any:
    """Returns a penalty of a registered name, such as ``"l2"``, with options, its fields.

    Raises:
        RecipeError: The name or an option is unknown, or a value does not fit.
    """
    return made(name, options, penalties(), "penalties", "penalty")
