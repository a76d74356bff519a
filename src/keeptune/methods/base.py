"""What a method is, where methods are found, and how a plan is made from one.

A method is a frozen dataclass whose fields are its options, in one file of this package or under the
entry-point group ``keeptune.methods``. A plan is made by map, reduce, map: ``score`` and ``build`` see one
target at a time, ``allocate`` sees the small scores of all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
import json
import logging
import math
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from importlib.metadata import entry_points
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor
from tqdm.auto import tqdm

import keeptune.methods
from keeptune.core.artefact import canonical_json
from keeptune.core.errors import PlanError, RecipeError, nearest
from keeptune.core.plan import Decision, Plan, Scope, TargetPlan
from keeptune.core.target import Target
from keeptune.methods.strength import Strength
from keeptune.penalties.base import PenaltySpec
from keeptune.statistics.collect import StatsView
from keeptune.statistics.request import Request

__all__ = [
    "Method",
    "Noted",
    "Searched",
    "allot_rank",
    "check_scaling",
    "dropout_field",
    "generator_for",
    "make_plan",
    "method_named",
    "methods",
    "penalties_of",
    "training_of",
    "warn_of_zeros",
]

_log = logging.getLogger(__name__)

S = TypeVar("S")


class Method(Protocol[S]):
    """A way to choose ranks and starting factors; S is a target's small summary (float, vector, None).

    Laws (``tests/contract``): equal inputs give bit-equal plans; ``requests`` are sufficient; ranks sum to at
    most the budget; installing the plan leaves the model's output unchanged, unless the class sets
    ``moves_start: ClassVar[bool] = True`` (KaSA drops a part of W for good).

    A method that asks something of the trainer has a sixth function, ``training()``, which gives the plan's
    ``training`` values (:mod:`keeptune.training.attach`); one with terms of the loss has ``penalties()``. One made of
    others (:mod:`keeptune.methods.combined`) tells their ``options()``, which else are its fields.
    """

    paper: ClassVar[str]
    scope: ClassVar[Scope]
    strength_option: ClassVar[Strength | None]

    @property
    def name(self) -> str:
        """Its registered name, a ``ClassVar`` of the class."""
        ...

    def requests(self, target: Target) -> frozenset[Request]:
        """Say which statistics the target needs.

        Args:
            target: The target.

        Returns:
            The requests; empty for a method without data.
        """
        ...

    def score(self, target: Target, weight: Tensor, stats: StatsView) -> S:
        """Summarise one target.

        Args:
            target: The target.
            weight: ``(m, n)``, float32.
            stats: What it requested.

        Returns:
            The summary.
        """
        ...

    def allocate(self, scores: Mapping[Target, S]) -> Mapping[Target, Decision]:
        """Decide ranks over the whole model.

        Args:
            scores: All summaries.

        Returns:
            A decision for every target; rank 0 leaves it alone.
        """
        ...

    def build(self, target: Target, weight: Tensor, stats: StatsView, decision: Decision) -> TargetPlan:
        """Make one target's starting factors.

        Args:
            target: The target.
            weight: ``(m, n)``, float32.
            stats: What it requested.
            decision: Its rank.

        Returns:
            The target's plan.
        """
        ...

    def peft(self) -> Mapping[str, Any]:
        """Give extra ``LoraConfig`` fields.

        Returns:
            Field to value, such as ``{"lora_dropout": 0.05}``.
        """
        ...


@runtime_checkable
class Noted(Protocol):
    """A method that has something to say about its decisions, besides the ranks."""

    def notes(self, decisions: Mapping[Target, Decision]) -> list[str]:
        """Say it.

        Args:
            decisions: From ``allocate``.

        Returns:
            Sentences, shown with the plan.
        """
        ...


@runtime_checkable
class Searched(Protocol):
    """A method with an option that short training runs decide, before a plan is made."""

    @property
    def boundary(self) -> Any:
        """``"auto"`` while it is undecided."""
        ...

    @property
    def search_steps(self) -> int:
        """Optimiser steps of one trial."""
        ...

    @property
    def search_examples(self) -> int:
        """Examples and texts that a trial is scored on."""
        ...

    def candidates(self, blocks: int) -> Sequence[Any]:
        """List what to try.

        Args:
            blocks: How many blocks the model has.

        Returns:
            Methods; nothing when all options are given.
        """
        ...


def make_plan(
    method: Method[S],
    targets: Sequence[Target],
    weight_of: Callable[[Target], Tensor],
    stats_of: Callable[[Target], StatsView],
    *,
    head: Sequence[str] = (),
    provenance: Mapping[str, Any] | None = None,
) -> Plan:
    """Run a method over a model: score each target, allocate over all, build each.

    Args:
        method: The method.
        targets: From :func:`keeptune.model.blocks.find_targets`.
        weight_of: Reads a target's weight, ``(m, n)`` float32; called once per target and phase.
        stats_of: Gives a target's statistics.
        head: Modules of a classifier that are trained in full beside the factors.
        provenance: Keys of what the plan was made from.

    Returns:
        The plan.

    Raises:
        PlanError: An option does not fit a target, or no target is left.
    """
    scores = {
        target: method.score(target, weight_of(target), stats_of(target)) for target in _shown(targets, "plan: scores")
    }
    decisions = method.allocate(scores)
    notes = [*(provenance or {}).get("notes", ()), *(method.notes(decisions) if isinstance(method, Noted) else ())]
    chosen = [target for target in targets if decisions[target].rank > 0]
    built = [
        method.build(target, weight_of(target), stats_of(target), decisions[target])
        for target in _shown(chosen, "plan: factors")
    ]
    return Plan(
        method=method.name,
        # As a saved plan has them: tuples are lists.
        options=json.loads(canonical_json(method.options() if hasattr(method, "options") else method)),
        targets=tuple(built),
        scope=method.scope,
        peft=dict(method.peft()) | ({"modules_to_save": list(head)} if head and method.scope != "all" else {}),
        training=training_of(method),
        provenance=dict(provenance or {}) | ({"notes": notes} if notes else {}),
    )


def penalties_of(method: Any) -> tuple[PenaltySpec, ...]:
    """List the terms of the loss that a method brings along.

    Args:
        method: The method.

    Returns:
        Its penalties; empty for most.
    """
    return tuple(method.penalties()) if hasattr(method, "penalties") else ()


def training_of(method: Any) -> Mapping[str, Any]:
    """Say what a method asks of the trainer.

    Args:
        method: The method.

    Returns:
        The plan's ``training`` values; nothing for most.
    """
    asked: Mapping[str, Any] = method.training() if hasattr(method, "training") else {}
    return asked


def _shown(targets: Sequence[Target], title: str) -> Iterable[Target]:
    return tqdm(targets, desc=title, delay=2, disable=None, leave=False)


def allot_rank(target: Target, rank: int, method: str) -> Decision:
    """Give a target the wanted rank, or say that it cannot have it.

    Args:
        target: The target.
        rank: The rank wanted.
        method: The method's name, for the error message.

    Returns:
        The decision.

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


def check_scaling(alpha: float | None, dropout: float) -> None:
    """Check the options that LoRA and its relatives share.

    Args:
        alpha: Scale numerator, or None for the method's own.
        dropout: Dropout before A.

    Raises:
        PlanError: alpha is not above 0, or dropout is not in [0, 1).
    """
    if not 0 <= dropout < 1:
        raise PlanError(
            "method.dropout", got=str(dropout), wanted="at least 0 and below 1", next_step="Correct the value."
        )
    if alpha is not None and not 0 < alpha < math.inf:
        raise PlanError("method.alpha", got=str(alpha), wanted="a number above 0", next_step="Correct it.")


def dropout_field(dropout: float) -> dict[str, Any]:
    """Hand dropout to PEFT.

    Args:
        dropout: Dropout before A.

    Returns:
        The ``LoraConfig`` field; nothing for 0.
    """
    return {"lora_dropout": dropout} if dropout else {}


def generator_for(target: Target, seed: int) -> torch.Generator:
    """Give a target a stream of random numbers of its own, whichever other targets are planned.

    Args:
        target: The target.
        seed: The method's seed.

    Returns:
        A generator on the CPU.
    """
    digest = hashlib.sha256(f"{seed}:{target.name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def warn_of_zeros(target: Target, S: Tensor, weight: Tensor) -> None:
    """Say when a start that is balanced has directions in which both factors are zero: they get no gradient.

    Args:
        target: The target.
        S: Singular values of the start ``(r,)``.
        weight: ``(m, n)``.
    """
    zeros = int((1e-7 * weight.norm() >= S).sum())
    if zeros:
        _log.warning(
            "%s: %d of the %d singular values it starts from are zero; these directions cannot be trained",
            target.name,
            zeros,
            len(S),
        )


def methods() -> dict[str, type[Any]]:
    """Find every method: the files of this package and the entry points ``keeptune.methods``.

    Returns:
        Name to class, sorted by name.

    Raises:
        RecipeError: Two methods share a name.
    """
    found: dict[str, type[Any]] = {}
    classes = [*_own(), *(point.load() for point in entry_points(group="keeptune.methods"))]
    for cls in classes:
        if found.setdefault(cls.name, cls) is not cls:
            raise RecipeError(
                f"method {cls.name}",
                got=f"two of that name: {found[cls.name]} and {cls}",
                wanted="one",
                next_step="Uninstall one of the packages or rename its method.",
            )
    return dict(sorted(found.items()))


def method_named(name: str) -> type[Any]:
    """Look a method up.

    Args:
        name: Its registered name, such as ``"lora-null"``.

    Returns:
        The class.

    Raises:
        RecipeError: There is none; the message shows the nearest name.
    """
    known = methods()
    if name not in known:
        raise RecipeError("method.name", got=f'"{name}"', wanted="the name of a method", next_step=nearest(name, known))
    return known[name]


@cache  # the files of the package do not change while it runs
def _own() -> tuple[type[Any], ...]:
    names = sorted(info.name for info in pkgutil.iter_modules(keeptune.methods.__path__))
    modules = [
        importlib.import_module(f"keeptune.methods.{name}") for name in names if name not in {"base", "combined"}
    ]
    return tuple(
        cls
        for module in modules
        for _, cls in inspect.getmembers(module, inspect.isclass)
        if cls.__module__ == module.__name__ and dataclasses.is_dataclass(cls) and hasattr(cls, "paper")
    )
