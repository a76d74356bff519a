"""The base class of methods, the list of all methods, and how a plan is made with one.

A method is a frozen dataclass whose fields are its options, in one file of this package or of another package under
the entry-point group ``keeptune.methods``. A plan is made by map, reduce, map: ``score`` and ``build`` see one target
at a time, ``allocate`` sees the scores of all.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

import keeptune.methods
from keeptune.core.artefact import canonical_json
from keeptune.core.errors import PlanError, RecipeError
from keeptune.core.low_rank import LowRank
from keeptune.core.options import Options, Range
from keeptune.core.plan import Decision, Plan, Scope, TargetPlan
from keeptune.core.processes import divided_in_groups
from keeptune.core.registry import look_up, registered
from keeptune.core.target import TRAINED_TENSORS, Target, TensorName
from keeptune.penalties.base import Penalty
from keeptune.statistics.collect import StatsView
from keeptune.statistics.request import Request

SCALING = {"alpha": Range(above=0), "dropout": Range(least=0, below=1)}


@dataclass(frozen=True)
class Size:
    """What a method trains of one target.

    Args:
        rank: The rank, or the number of rows that are trained.
        trained: Numbers that are trained.
        frozen: Numbers of frozen factors beside them.
        assumed: Data decide the rank; this is the average.
        implied: Of all these, numbers that a plan does not hold, for its rows say them.
        kept: Numbers of the directions that the plan holds besides, for training to stay off them.
    """

    rank: int
    trained: int
    frozen: int = 0
    assumed: bool = False
    implied: int = 0
    kept: int = 0


# The name of an option, and what a factor above 1 does to it to keep more: a weight on forgetting is multiplied, a
# budget for it, or how much is trained, divided.
Strength = tuple[str, Literal["multiplied", "divided"]]


@dataclass(frozen=True)
class Method(Options):
    """A way to choose ranks and starting factors. The defaults leave every target alone.

    Laws (``tests/contract``): equal inputs give bit-equal plans; ``requests`` are sufficient; ranks sum to at
    most the budget; installing the plan leaves the model's output unchanged.

    Attributes:
        name: Its registered name.
        paper: Its source.
        scope: ``"adapter"`` for low-rank factors; see :class:`keeptune.core.plan.Plan`.
        strength_option: Which option sets how much it keeps; None where there is none.
        anchored: Whether a part of W is taken out at the start: on a 16-bit base by a frozen twin of the same size.
        rows_of_downs: Whether it trains rows of the MLPs' down-projections (LoKI); ``size`` needs to know them.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    section: ClassVar[str] = "method."
    scope: ClassVar[Scope] = "adapter"
    strength_option: ClassVar[Strength | None] = None
    anchored: ClassVar[bool] = False
    rows_of_downs: ClassVar[bool] = False

    @property
    def trains(self) -> frozenset[TensorName]:
        """The factors that are trained, and the vectors beside them."""
        return frozenset({"A", "B"})

    @property
    def statistics(self) -> frozenset[Request]:
        """All statistics that the method takes, of whichever target; empty for a method without data."""
        return frozenset()

    def requests(self, target: Target) -> frozenset[Request]:
        """Returns the statistics that a target needs, by default all of them."""
        return self.statistics

    def score(self, target: Target, weight: Tensor, stats: StatsView) -> Any:
        """Summarises a target for :meth:`allocate`, given W ``(m, n)``, float32, and what was requested.

        Returns:
            The summary, small; None where all targets are treated alike.
        """
        return None

    def allocate(self, scores: Mapping[Target, Any]) -> Mapping[Target, Decision]:
        """Decides the ranks of all targets.

        Returns:
            Target to decision; rank 0 leaves a target alone.
        """
        return {target: Decision(0) for target in scores}

    def build(self, target: Target, weight: Tensor, stats: StatsView, decision: Decision) -> TargetPlan:
        """Computes the starting factors of a target with a rank above 0, given W ``(m, n)``, float32."""
        raise NotImplementedError(f"{self.name} builds no adapter")

    def size(self, target: Target, downs: Collection[str]) -> Size:
        """Counts what is trained of a target, before a plan is made; zero for one that is left alone.

        ``downs`` are names of the MLPs' down-projections, where ``rows_of_downs`` is set.
        """
        return Size(0, 0)

    def peft(self) -> Mapping[str, Any]:
        """Returns further fields of ``LoraConfig``, such as ``{"lora_dropout": 0.05}``."""
        return {}

    def training(self) -> Mapping[str, Any]:
        """Returns what the trainer must have, as plain values (:mod:`keeptune.training.attach`)."""
        return {}

    def penalties(self) -> tuple[Penalty, ...]:
        """Returns the terms of the loss that belong to the method."""
        return ()

    def notes(self, decisions: Mapping[Target, Decision]) -> list[str]:
        """Returns sentences about the decisions of :meth:`allocate` that are shown with the plan."""
        return []

    def options(self) -> dict[str, Any]:
        """Returns the options as a saved plan has them: tuples are lists."""
        return dict(json.loads(canonical_json(dataclasses.asdict(self))))

    def fitted(self, blocks: int) -> Self:
        """Returns the method with the options decided that follow from how many blocks a model has."""
        return self

    def planned(self, target: Target, decision: Decision, init: LowRank, scale: float, **parts: Any) -> TargetPlan:
        """Returns a target's plan that trains :attr:`trains`; ``parts`` are further fields of ``TargetPlan``."""
        parts = {"trainable": self.trains, **parts}
        return TargetPlan(target=target, decision=decision, init=init, scale=scale, **parts)


@dataclass(frozen=True)
class RankMethod(Method):
    """A method that trains factors of one rank at every target.

    Args:
        rank: r, at every target.
    """

    rank: int = 8

    def allocate(self, scores: Mapping[Target, Any]) -> Mapping[Target, Decision]:
        """Decides on the same rank for all targets."""
        return {target: allot_rank(target, self.rank, self.name) for target in scores}

    def size(self, target: Target, downs: Collection[str]) -> Size:
        """Counts the elements of the tensors that are trained, and of a frozen A or B."""
        return self.size_at(target, allot_rank(target, self.rank, self.name).rank)

    def size_at(self, target: Target, r: int, *, assumed: bool = False) -> Size:
        """Counts what is trained of a target of a given rank."""
        sizes = {name: kind.numel(target, r) for name, kind in TRAINED_TENSORS.items()}
        trained = sum(sizes[name] for name in self.trains)
        frozen = sum(sizes[name] for name in ("A", "B") if name not in self.trains)
        return Size(r, trained, frozen, assumed)


@dataclass(frozen=True)
class ScaledMethod(RankMethod):
    """A method whose change is ``(alpha / r) B A``, with dropout.

    Args:
        alpha: Scale numerator; None is r, a scale of 1.
        dropout: Dropout before A, during training.
    """

    ranges = SCALING
    default_scale: ClassVar[float] = 1.0

    alpha: float | None = None
    dropout: float = 0.0

    def scale_at(self, r: int) -> float:
        """Returns the scale of the change."""
        return self.default_scale if self.alpha is None else self.alpha / r

    def peft(self) -> Mapping[str, Any]:
        """Returns the dropout."""
        return dropout_field(self.dropout)


def make_plan(
    method: Method,
    targets: Sequence[Target],
    weight_of: Callable[[Target], Tensor],
    stats_of: Callable[[Target], StatsView],
    *,
    head: Sequence[str] = (),
    provenance: Mapping[str, Any] | None = None,
) -> Plan:
    """Plans a model: scores each target, allocates over all, builds each; several processes divide the targets.

    ``weight_of`` reads a target's weight, ``(m, n)`` float32, once per phase; ``head`` names modules of a classifier
    that are trained in full beside the factors; ``provenance`` has the keys of what the plan was made from.

    Raises:
        PlanError: An option does not fit a target, or no target is left.
    """

    def score(target: Target) -> Any:
        return method.score(target, weight_of(target), stats_of(target))

    def build(target: Target) -> TargetPlan:
        return method.build(target, weight_of(target), stats_of(target), decisions[target])

    scores = divided_in_groups(targets, attrgetter("input_group"), score, title="plan: scores")
    decisions = method.allocate(dict(zip(targets, scores, strict=True)))
    notes = [*(provenance or {}).get("notes", ()), *method.notes(decisions)]
    chosen = [target for target in targets if decisions[target].rank > 0]
    built = divided_in_groups(chosen, attrgetter("input_group"), build, title="plan: factors")
    return Plan(
        method=method.name,
        options=method.options(),
        targets=tuple(built),
        scope=method.scope,
        peft=dict(method.peft()) | ({"modules_to_save": list(head)} if head and method.scope != "all" else {}),
        training=method.training(),
        provenance=dict(provenance or {}) | ({"notes": notes} if notes else {}),
    )


def allot_rank(target: Target, rank: int, method: str) -> Decision:
    """Returns the decision for a rank that a target can have.

    Raises:
        PlanError: The rank is below 1 or above ``min(m, n)``.
    """
    if not 1 <= rank <= target.max_rank:
        raise PlanError(
            f"method {method}, target {target.name}",
            got=f"rank {rank}",
            wanted=f"1 to {target.max_rank} for a {target.out_features} x {target.in_features} map",
            next_step=f"Lower `method.rank`, or leave the role {target.role} out of `targets`.",
        )
    return Decision(rank)


def refuse_experts(method: Method, targets: Iterable[Target]) -> None:
    """Refuses what PEFT cannot do to a parameter that holds several experts: it trains A and B there, and no more.

    Raises:
        PlanError: The method asks for more, of targets that are such experts.
    """
    roles = sorted({target.role for target in targets if target.expert is not None})
    reason = " and ".join(f"{key} {value}" for key, value in sorted(method.peft().items()))
    if method.rows_of_downs:
        reason = f"{method.name}'s layers, which wrap modules"
    elif special := sorted(method.trains - {"A", "B"}):
        reason = f"{', '.join(special)} trained beside A and B"
    if roles and reason and method.scope != "all":
        raise PlanError(
            f"method {method.name}, targets {', '.join(roles)}",
            got=f"experts of fused weights, and {reason}",
            wanted="A and B alone: PEFT trains nothing else of a parameter that holds several experts",
            next_step="List the other roles under `targets`, or take another method or option for these.",
        )


def stronger(method: Any, factor: float) -> tuple[str, float]:
    """Multiplies how much a method keeps by a factor above 0; above 1 keeps more.

    Raises:
        RecipeError: The method has no strength, or its strength is 0, which no factor moves.

    >>> from keeptune.methods.lalora import Lalora
    >>> stronger(Lalora(strength=100.0), 3)
    ('strength', 300.0)
    """
    known: Strength | None = method.strength_option
    if known is None:
        raise RecipeError(
            f"method {method.name}, strength",
            got=f"the factor {factor:g}",
            wanted="no factor: this method has no option for how much it keeps",
            next_step="Vary an option by name, such as strength: {method.rank: [4, 8]}.",
        )
    option, keeps_more = known
    value = getattr(method, option)
    if value == 0:
        raise RecipeError(
            f"method.{option}",
            got=f"0, with the factor {factor:g}",
            wanted="a value that a factor can move",
            next_step="Set the value that factor 1 stands for, or leave the factors out.",
        )
    return option, value * factor if keeps_more == "multiplied" else value / factor


def dropout_field(dropout: float) -> dict[str, Any]:
    """Returns the ``LoraConfig`` field of a dropout; nothing for 0."""
    return {"lora_dropout": dropout} if dropout else {}


def generator_for(target: Target, seed: int) -> torch.Generator:
    """Returns a target's own stream of random numbers, which does not depend on the other targets."""
    digest = hashlib.sha256(f"{seed}:{target.name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def methods() -> dict[str, type[Any]]:
    """Returns every method: this package's and those of entry points; a RecipeError says that two share a name."""
    return registered(keeptune.methods, Method, "method")


def method_named(name: str) -> type[Any]:
    """Returns the method of a name, such as ``"lora-null"``; a RecipeError shows the nearest where there is none."""
    return look_up(name, methods(), "method.name", "method")
