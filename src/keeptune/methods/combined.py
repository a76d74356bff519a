"""Several methods in one plan, each for its own roles: LoKI for the down projections, LoRA-Null for the others.

A :class:`Combined` is a method like any other: it does with a target what the method of the target's role does.
Laws, for every target t of a part p (``tests/pipeline/test_combining.py``):

    plan(parts)[t] = plan(p)[t], bit for bit         and the order of the parts does not matter

Targets of a role that no part names are left alone. Penalties that a method brings along hold its own targets only
(:func:`keeptune.pipeline.planning.scoped_penalties`). What PEFT's config and the trainer have one of for the whole
model, such as dropout, DoRA's forward pass and the optimiser, must be the same in all parts.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from keeptune.core.errors import PlanError
from keeptune.core.plan import Decision, TargetPlan
from keeptune.core.target import Target
from keeptune.methods.base import Method, Size
from keeptune.statistics.collect import StatsView
from keeptune.statistics.request import Request


@dataclass(frozen=True)
class Part:
    """A method and the roles it is for.

    Args:
        method: The method.
        targets: Roles, such as ``["down_proj"]``.

    Raises:
        PlanError: The roles are one text.
    """

    method: Method
    targets: Sequence[str]
    name: str = field(init=False)  # equal options of two methods would else be equal parts, and have equal keys

    def __post_init__(self) -> None:
        """Sorts the roles, and takes the method's name.

        Raises:
            PlanError: The roles are one text.
        """
        if isinstance(self.targets, str):
            raise PlanError(
                f"method {self.method.name}, targets",
                got=repr(self.targets),
                wanted="a list of roles",
                next_step=f'Write ["{self.targets}"].',
            )
        object.__setattr__(self, "targets", tuple(sorted(self.targets)))
        object.__setattr__(self, "name", self.method.name)


@dataclass(frozen=True)
class Combined(Method):
    """Methods side by side.

    Args:
        parts: The methods with their roles, in any order; they are kept sorted by name.

    Raises:
        PlanError: A role has two methods or none, a method trains whole weights, or two want different things of
            what there is one of.
    """

    paper = ""

    parts: Sequence[Part]

    def __post_init__(self) -> None:
        """Sorts and checks the parts.

        Raises:
            PlanError: They do not fit together.
        """
        object.__setattr__(self, "parts", tuple(sorted(self.parts, key=lambda part: (part.name, part.targets))))
        object.__setattr__(self, "name", "+".join(part.name for part in self.parts))
        _check_roles(self.parts)
        for part in self.parts:
            if part.method.scope != "adapter":
                raise PlanError(
                    f"method {part.name}, targets {', '.join(part.targets)}",
                    got="a method that trains whole weights, as one of several",
                    wanted="methods that train adapters: they are installed as one adapter",
                    next_step=f"Run {part.name} alone, or take another method for these roles.",
                )
        if sum(part.method.search is not None for part in self.parts) > 1:
            raise PlanError(
                f"method {self.name}",
                got="boundary: auto of two methods",
                wanted="one at most: the search decides one option",
                next_step="Set one of them to a number of blocks.",
            )
        self.peft()
        self.training()

    @property
    def statistics(self) -> frozenset[Request]:
        """What the methods take."""
        return frozenset().union(*(part.method.statistics for part in self.parts))

    def requests(self, target: Target) -> frozenset[Request]:
        """Returns what the method of the target's role needs."""
        return self._of(target).requests(target)

    def score(self, target: Target, weight: Tensor, stats: StatsView) -> Any:
        """Summarises the target as the method of its role does."""
        return self._of(target).score(target, weight, stats)

    def allocate(self, scores: Mapping[Target, Any]) -> Mapping[Target, Decision]:
        """Lets each method decide over its own targets.

        Raises:
            PlanError: A part has no targets.
        """
        decisions = {target: Decision(0) for target in scores}
        for part in self.parts:
            own = {target: score for target, score in scores.items() if target.role in part.targets}
            if not own:
                raise PlanError(
                    f"method {part.name}, targets {', '.join(part.targets)}",
                    got="no target of these roles",
                    wanted="one at least in the blocks that are tuned",
                    next_step="Check `layers` and the roles.",
                )
            decisions |= part.method.allocate(own)
        return decisions

    def build(self, target: Target, weight: Tensor, stats: StatsView, decision: Decision) -> TargetPlan:
        """Starts the target as the method of its role does."""
        return self._of(target).build(target, weight, stats, decision)

    def size(self, target: Target, downs: Collection[str]) -> Size:
        """Counts what the method of the target's role trains."""
        return self._of(target).size(target, downs)

    def peft(self) -> Mapping[str, Any]:
        """Returns the fields, which must be the same for all parts."""
        return _agreed([(part, part.method.peft()) for part in self.parts], "PEFT has one for the whole adapter")

    def training(self) -> Mapping[str, Any]:
        """Returns what the trainer must have, the same for all parts."""
        return _agreed([(part, part.method.training()) for part in self.parts], "the trainer has one for all targets")

    def notes(self, decisions: Mapping[Target, Decision]) -> list[str]:
        """Returns which method has which roles, and the notes of each."""
        notes = [f"{part.name}: {', '.join(part.targets)}" for part in self.parts]
        for part in self.parts:
            own = {target: decision for target, decision in decisions.items() if target.role in part.targets}
            notes += [f"{part.name}: {note}" for note in part.method.notes(own)]
        return notes

    def options(self) -> Mapping[str, Any]:
        """Returns the options of all parts, each under its method's name, and its roles where two are of one name."""
        names = [part.name for part in self.parts]
        options: dict[str, Any] = {}
        for part in self.parts:
            label = part.name if names.count(part.name) == 1 else f"{part.name} ({' '.join(part.targets)})"
            options |= {f"{label}.{key}": value for key, value in part.method.options().items()}
            options[f"{label}.targets"] = list(part.targets)
        return options

    def _of(self, target: Target) -> Method:
        """Returns the method of a target's role, or one that leaves the target alone."""
        return next((part.method for part in self.parts if target.role in part.targets), Method())


def parts_of(method: Method) -> tuple[Part, ...]:
    """Returns the methods that make up a method.

    Returns:
        Its parts; a plain method is one, without roles of its own.
    """
    return tuple(method.parts) if isinstance(method, Combined) else (Part(method, ()),)


def refuse_experts(method: Method, targets: Iterable[Target]) -> None:
    """Refuses what PEFT cannot do to a parameter that holds several experts: it trains A and B there, and no more.

    Args:
        method: The method.
        targets: What is to be tuned.

    Raises:
        PlanError: The method asks for more, of targets that are such experts.
    """
    roles = {target.role for target in targets if target.expert is not None}
    for part in parts_of(method):
        own = sorted(roles & set(part.targets) if part.targets else roles)
        reason = _more_than_factors(part.method)
        if own and reason:
            raise PlanError(
                f"method {part.name}, targets {', '.join(own)}",
                got=f"experts of fused weights, and {reason}",
                wanted="A and B alone: PEFT trains nothing else of a parameter that holds several experts",
                next_step="List the other roles under `targets`, or take another method or option for these.",
            )


def _more_than_factors(method: Method) -> str:
    """Names what a method wants besides trained factors; empty for nothing."""
    if method.scope == "all":
        return ""
    special = sorted(method.trains - {"A", "B"})
    if method.rows_of_downs:
        return f"{method.name}'s layers, which wrap modules"
    if special:
        return f"{', '.join(special)} trained beside A and B"
    if method.peft():
        return " and ".join(f"{key} {value}" for key, value in sorted(method.peft().items()))
    optimizer = method.training().get("optimizer")
    return f"the optimiser {optimizer}, which takes all experts for one map" if optimizer else ""


def replaced(method: Method, old: Method, new: Method) -> Method:
    """Replaces a method by another one."""
    if not isinstance(method, Combined):
        return new if method is old else method
    return Combined([Part(new if part.method is old else part.method, part.targets) for part in method.parts])


def tuned_roles(method: Method, roles: Sequence[str] | None) -> list[str] | None:
    """Returns the roles that are tuned.

    Args:
        method: The method.
        roles: Those of the recipe; None is all linear maps but the head.

    Returns:
        The roles; those that the parts name, where the method has parts.

    Raises:
        PlanError: The recipe has roles, and the parts of the method name theirs.
    """
    if not isinstance(method, Combined):
        return None if roles is None else list(roles)
    if roles is not None:
        raise PlanError(
            "targets",
            got=f"{', '.join(roles)}, beside methods with `targets` of their own",
            wanted="none: each method names its roles",
            next_step="Leave the recipe's `targets` out.",
        )
    return sorted(role for part in method.parts for role in part.targets)


def _check_roles(parts: Sequence[Part]) -> None:
    """Checks that there are parts, that each has roles, and each role one part."""
    if not parts:
        raise PlanError(
            "method", got="an empty list", wanted="a method at least", next_step="Example: method: {name: lora}."
        )
    claimed: dict[str, Part] = {}
    for part in parts:
        if not part.targets:
            raise PlanError(
                f"method {part.name}, targets",
                got="none",
                wanted="the roles that this method is for",
                next_step="Name them, such as `targets: [down_proj]`.",
            )
        for role in part.targets:
            if role in claimed:
                raise PlanError(
                    f"method {part.name}, targets",
                    got=f"{role}, which {claimed[role].name} has too" if claimed[role] is not part else f"{role} twice",
                    wanted="one method for each role",
                    next_step=f"Take {role} out of one of them.",
                )
            claimed[role] = part


def _agreed(values: Sequence[tuple[Part, Mapping[str, Any]]], reason: str) -> Mapping[str, Any]:
    """Returns the values of all parts, which must be equal."""
    (first, wanted), *others = values
    for part, own in others:
        for key in sorted({*wanted, *own}):
            if wanted.get(key) != own.get(key):
                raise PlanError(
                    f"methods {first.name} and {part.name}",
                    got=f"{_shown(key, wanted)} of {first.name}, {_shown(key, own)} of {part.name}",
                    wanted=f"the same of both: {reason}",
                    next_step="Set the same options for it in all sections, or in none.",
                )
    return wanted


def _shown(key: str, values: Mapping[str, Any]) -> str:
    return f"{key} {json.dumps(values[key])}" if key in values else f"no {key}"
