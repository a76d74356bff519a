"""Several methods in one plan, each for its own roles: LoKI for the down projections, LoRA-Null for the others.

A :class:`Combined` is a method like any other: what it asks of a target, allots to it and builds for it is what the
method of the target's role does. Laws, for every target t of a part p (``tests/test_combining.py``):

    plan(parts)[t] = plan(p)[t], bit for bit         and the order of the parts does not matter

Targets of a role that no part names are left alone. Penalties that a method brings along hold its own targets only
(:func:`keeptune.pipeline.planning.asked_penalties`). What PEFT's config and the trainer have one of for the whole
model, such as dropout, DoRA's forward pass and the optimiser, must be the same in all parts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from keeptune.core.artefact import canonical_json
from keeptune.core.errors import PlanError
from keeptune.core.plan import Decision, Scope, TargetPlan
from keeptune.core.target import Target
from keeptune.methods.base import Method, Noted, Searched, training_of
from keeptune.methods.strength import Strength
from keeptune.statistics.collect import StatsView
from keeptune.statistics.request import Request

__all__ = ["Combined", "Part", "parts_of", "replaced", "tuned_roles"]


@dataclass(frozen=True)
class Part:
    """A method and the roles it is for.

    Args:
        method: The method.
        targets: Roles, such as ``["down_proj"]``.

    Raises:
        PlanError: The roles are one text.
    """

    method: Any
    targets: Sequence[str]
    name: str = field(init=False)  # equal options of two methods would else be equal parts, and have equal keys

    def __post_init__(self) -> None:
        """Sort the roles, and note the method's name.

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
class Combined:
    """Methods side by side.

    Args:
        parts: The methods with their roles, in any order; they are kept sorted by name.

    Raises:
        PlanError: A role has two methods or none, a method trains whole weights, or two want different things of
            what there is one of.
    """

    paper: ClassVar[str] = ""
    scope: ClassVar[Scope] = "adapter"
    strength_option: ClassVar[Strength | None] = None

    parts: Sequence[Part]

    def __post_init__(self) -> None:
        """Sort and check the parts.

        Raises:
            PlanError: They do not fit together.
        """
        object.__setattr__(self, "parts", tuple(sorted(self.parts, key=lambda part: (part.name, part.targets))))
        _check_roles(self.parts)
        for part in self.parts:
            if part.method.scope != "adapter":
                raise PlanError(
                    f"method {part.name}, targets {', '.join(part.targets)}",
                    got="a method that trains whole weights, as one of several",
                    wanted="methods that train adapters: they are installed as one adapter",
                    next_step=f"Run {part.name} alone, or take another method for these roles.",
                )
        if sum(isinstance(part.method, Searched) and part.method.boundary == "auto" for part in self.parts) > 1:
            raise PlanError(
                f"method {self.name}",
                got="boundary: auto of two methods",
                wanted="one at most: the search decides one option",
                next_step="Give one of them as a number of blocks.",
            )
        self.peft()
        self.training()

    @property
    def name(self) -> str:
        """The names of the methods, such as ``"loki+lora-null"``."""
        return "+".join(part.name for part in self.parts)

    def requests(self, target: Target) -> frozenset[Request]:
        """Need what the method of its role needs."""
        method = self._of(target)
        return frozenset() if method is None else method.requests(target)

    def score(self, target: Target, weight: Tensor, stats: StatsView) -> Any:
        """Summarise the target as the method of its role does."""
        method = self._of(target)
        return None if method is None else method.score(target, weight, stats)

    def allocate(self, scores: Mapping[Target, Any]) -> Mapping[Target, Decision]:
        """Let each method decide over its own targets.

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
        """Start the target as the method of its role does."""
        method = self._of(target)
        assert method is not None, "no rank is given to a target without a method"
        made: TargetPlan = method.build(target, weight, stats, decision)
        return made

    def peft(self) -> Mapping[str, Any]:
        """Give the fields that all parts ask for.

        Raises:
            PlanError: They ask for different ones.
        """
        return _agreed([(part, part.method.peft()) for part in self.parts], "PEFT has one for the whole adapter")

    def training(self) -> Mapping[str, Any]:
        """Ask what all parts ask of the trainer.

        Raises:
            PlanError: They ask for different things.
        """
        return _agreed([(part, training_of(part.method)) for part in self.parts], "the trainer has one for all targets")

    def notes(self, decisions: Mapping[Target, Decision]) -> list[str]:
        """Say which method has which roles, and what each has to say."""
        said = [f"{part.name}: {', '.join(part.targets)}" for part in self.parts]
        for part in self.parts:
            if isinstance(part.method, Noted):
                own = {target: found for target, found in decisions.items() if target.role in part.targets}
                said += [f"{part.name}: {note}" for note in part.method.notes(own)]
        return said

    def options(self) -> Mapping[str, Any]:
        """Tell the options of all parts, each under its method's name, and its roles where two are of one name."""
        names = [part.name for part in self.parts]
        told: dict[str, Any] = {}
        for part in self.parts:
            label = part.name if names.count(part.name) == 1 else f"{part.name} ({' '.join(part.targets)})"
            told |= {f"{label}.{key}": value for key, value in json.loads(canonical_json(part.method)).items()}
            told[f"{label}.targets"] = list(part.targets)
        return told

    def _of(self, target: Target) -> Any:
        """Find the method of a target's role; None where no part names it."""
        return next((part.method for part in self.parts if target.role in part.targets), None)


def parts_of(method: Method[Any]) -> tuple[Part, ...]:
    """List the methods that make up a method.

    Args:
        method: The method.

    Returns:
        Its parts; a plain method is one, without roles of its own.
    """
    return tuple(method.parts) if isinstance(method, Combined) else (Part(method, ()),)


def replaced(method: Method[Any], old: Method[Any], new: Method[Any]) -> Method[Any]:
    """Put another method in the place of one.

    Args:
        method: A plain method, or several side by side.
        old: The method itself, or one of its parts'.
        new: What takes its place, and its roles.

    Returns:
        The new whole.
    """
    if not isinstance(method, Combined):
        return new if method is old else method
    return Combined([Part(new if part.method is old else part.method, part.targets) for part in method.parts])


def tuned_roles(method: Method[Any], roles: Sequence[str] | None) -> list[str] | None:
    """Say which roles are tuned.

    Args:
        method: The method.
        roles: Those that are asked for beside it; None is all linear maps but the head.

    Returns:
        The roles; those that the parts name, where the method has parts.

    Raises:
        PlanError: Roles are asked for beside a method whose parts name theirs.
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
    """Check that there are parts, that each has roles, and each role one part."""
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
                next_step="Give them, such as `targets: [down_proj]`.",
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


def _agreed(said: Sequence[tuple[Part, Mapping[str, Any]]], reason: str) -> Mapping[str, Any]:
    """Give what all say; what one does not say must be said by none."""
    (first, wanted), *others = said
    for part, found in others:
        for key in sorted({*wanted, *found}):
            if wanted.get(key) != found.get(key):
                raise PlanError(
                    f"methods {first.name} and {part.name}",
                    got=f"{_told(key, wanted)} of {first.name}, {_told(key, found)} of {part.name}",
                    wanted=f"the same of both: {reason}",
                    next_step="Give all sections the same options for it, or none.",
                )
    return wanted


def _told(key: str, found: Mapping[str, Any]) -> str:
    return f"{key} {json.dumps(found[key])}" if key in found else f"no {key}"
