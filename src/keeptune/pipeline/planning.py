"""From a loaded model and data to statistics and a plan: what the job and the Python interface share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel

from keeptune.core.errors import PlanError
from keeptune.core.low_rank import LowRank
from keeptune.core.plan import Decision, PenaltyPlan, Plan, TargetPlan
from keeptune.core.target import Target, read_weight
from keeptune.data.calibration import Calibration
from keeptune.methods.base import Method, make_plan
from keeptune.methods.combined import parts_of, tuned_roles
from keeptune.model.blocks import depth, find_targets, head_of
from keeptune.model.head import body_fingerprint
from keeptune.model.pretrained import refuse_not_finite
from keeptune.model.runner import ResidentRunner
from keeptune.penalties.base import Concluding, PenaltySpec, Site, notes_of, penalty_plan
from keeptune.penalties.on_outputs import OfOutputs
from keeptune.statistics.collect import Statistics, collect
from keeptune.statistics.request import DataRole, Request
from keeptune.statistics.store import StatStore

__all__ = [
    "Asked",
    "asked_penalties",
    "plan_for",
    "refuse_layers",
    "refuse_penalties",
    "starting_from",
    "statistics_for",
    "with_penalties",
]


@dataclass(frozen=True)
class Asked:
    """A penalty of a run.

    Args:
        penalty: The penalty.
        roles: Of the targets it holds; none is all of the plan's.
    """

    penalty: PenaltySpec
    roles: Sequence[str] = ()

    def holds(self, target: Target) -> bool:
        """Say whether it acts on a target.

        Args:
            target: The target.

        Returns:
            True where it does.
        """
        return not self.roles or target.role in self.roles


def asked_penalties(method: Method, extra: Sequence[PenaltySpec] = ()) -> tuple[Asked, ...]:
    """List the penalties of a run: the method's own, then others; strength 0 is none.

    Of several methods, each one's own penalties hold the targets of its roles.

    Args:
        method: The method.
        extra: Those asked for besides; they hold all targets.

    Returns:
        The penalties.
    """
    own = [Asked(penalty, part.targets) for part in parts_of(method) for penalty in part.method.penalties()]
    return tuple(asked for asked in (*own, *map(Asked, extra)) if asked.penalty.strength > 0)


def refuse_penalties(method: Method, asked: Sequence[Asked]) -> None:
    """Refuse penalties that a method cannot have: they act on low-rank factors, and each on those of its own roles.

    Args:
        method: The method.
        asked: The penalties wanted.

    Raises:
        PlanError: There are penalties, and the method trains no factors; or one of several methods brings a penalty
            that cannot be confined to its targets, or a second one whose reports could not be told apart.
    """
    names = [one.penalty.name for one in asked]
    if asked and method.scope != "adapter":
        raise PlanError(
            f"method {method.name}",
            got=f"the penalties {', '.join(names)}",
            wanted="no `penalties`: it changes whole weights, and penalties act on low-rank factors",
            next_step="Leave `penalties` out, or take a method that trains adapters.",
        )
    for one in asked:
        name = one.penalty.name
        if one.roles and isinstance(one.penalty, OfOutputs):
            raise PlanError(
                f"method {method.name}",
                got=f"the penalty {name} for {', '.join(one.roles)}",
                wanted="a penalty on single targets: this one is on what the whole model says",
                next_step="Take that method alone.",
            )
        if isinstance(one.penalty, Concluding) and names.count(name) > 1:
            raise PlanError(
                f"method {method.name}",
                got=f"{names.count(name)} penalties {name}",
                wanted="one: what each logs and says at the end could not be told apart",
                next_step=f"Leave one out; under `penalties`, {name} holds all targets.",
            )


def refuse_layers(method: Method, layers: Sequence[int] | None) -> None:
    """Refuse to confine a method to blocks that trains every weight anyway.

    Args:
        method: The method.
        layers: The blocks wanted; None is all.

    Raises:
        PlanError: There are blocks, and the method has no targets to choose from.
    """
    if layers is not None and method.scope == "all":
        raise PlanError(
            f"method {method.name}",
            got=f"layers {list(layers)}",
            wanted="no `layers`: it trains every weight of the model",
            next_step="Leave `layers` out (or set it to null), or take a method that trains adapters.",
        )


def statistics_for(
    model: PreTrainedModel,
    method: Method,
    store: StatStore,
    *,
    data: Mapping[DataRole, Calibration],
    roles: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    fingerprint: str | None = None,
    low_memory: bool = False,
) -> tuple[list[Target], Statistics]:
    """Collect what a method requests of a model; what the store has is not computed again.

    Args:
        model: The base model.
        method: The method.
        store: Where entries are looked up and kept.
        data: Tokens per data role.
        roles: Roles of the targets; None is all linear maps but the head, or those that methods side by side name.
        layers: Blocks of the targets; None is all.
        fingerprint: Of the model's weights, if it is known already.
        low_memory: Hold no more covariances at a time than take the memory of the largest; it takes more passes.

    Returns:
        The targets and access to their statistics; experts that no token reached are left out.

    Raises:
        PlanError: A role or a block does not exist, or the method cannot be confined to blocks.
        StatisticsError: Data that are requested are not given, or activations are not finite.
    """
    refuse_layers(method, layers)
    targets = find_targets(model, tuned_roles(method, roles), layers)
    statistics = collect(
        ResidentRunner(model),
        targets,
        {target.name: method.requests(target) for target in targets},
        data,
        store,
        model_fingerprint=fingerprint or body_fingerprint(model),
        low_memory=low_memory,
    )
    return [target for target in targets if target.name not in statistics.unseen], statistics


def plan_for(
    model: PreTrainedModel,
    method: Method,
    store: StatStore,
    *,
    data: Mapping[DataRole, Calibration],
    penalties: Sequence[PenaltySpec] = (),
    roles: Sequence[str] | None = None,
    layers: Sequence[int] | None = None,
    fingerprint: str | None = None,
    low_memory: bool = False,
    provenance: Mapping[str, Any] | None = None,
) -> Plan:
    """Make a method's plan for a model, collecting what it needs.

    Args:
        model: The base model.
        method: The method.
        store: Where statistics are looked up and kept.
        data: Tokens per data role.
        penalties: Terms of the loss besides the method's own.
        roles: Roles of the targets; None is all linear maps but the head, or those that methods side by side name.
        layers: Blocks of the targets; None is all.
        fingerprint: Of the model's weights, if it is known already.
        low_memory: Hold no more covariances at a time than take the memory of the largest.
        provenance: What the plan was made from, for the record.

    Returns:
        The plan.

    Raises:
        PlanError: A role or a block does not exist, an option does not fit a target or the blocks, or the method
            takes no penalties.
        ModelError: A weight is NaN or infinite.
        StatisticsError: Data that are requested are not given, or activations are not finite.
    """
    refuse_not_finite(model)
    fingerprint = fingerprint or body_fingerprint(model)
    asked = asked_penalties(method, penalties)
    refuse_penalties(method, asked)
    targets, statistics = statistics_for(
        model, method, store, data=data, roles=roles, layers=layers, fingerprint=fingerprint, low_memory=low_memory
    )
    made_from = {"model": fingerprint, **(provenance or {})}
    if statistics.unseen:
        names = ", ".join(sorted(statistics.unseen))
        made_from["notes"] = [*made_from.get("notes", ()), f"no token of the data reached {names}: left alone"]
    made = make_plan(
        method,
        targets,
        lambda target: read_weight(model, target),
        statistics.view,
        head=head_of(model),
        provenance=made_from,
    )
    return with_penalties(
        made, asked, ResidentRunner(model), data, store, model_fingerprint=fingerprint, low_memory=low_memory
    )


def starting_from(targets: Iterable[Target], changes: Mapping[str, LowRank]) -> tuple[TargetPlan, ...]:
    """Plan targets that start from changes: installing the plan gives the changed model.

    Args:
        targets: The targets.
        changes: Target name to change, of each.

    Returns:
        Their plans, with both factors trained and nothing taken out of W.
    """
    return tuple(
        TargetPlan(
            target=target,
            decision=Decision(changes[target.name].rank),
            init=changes[target.name],
            scale=1.0,
            trainable=frozenset({"A", "B"}),
            removed=changes[target.name].scaled(0.0),
        )
        for target in targets
    )


def with_penalties(
    plan: Plan,
    asked: Sequence[Asked],
    runner: ResidentRunner,
    data: Mapping[DataRole, Calibration],
    store: StatStore,
    *,
    model_fingerprint: str,
    low_memory: bool = False,
) -> Plan:
    """Add penalties to a plan, collecting what they need; only now, for curvature may be taken at its factors.

    Args:
        plan: The plan.
        asked: What to add.
        runner: Runs the base model.
        data: Tokens per data role.
        store: Where statistics are looked up and kept.
        model_fingerprint: Of the model's weights.
        low_memory: Hold no more sums at a time than take the memory of the largest.

    Returns:
        The plan with the penalties.

    Raises:
        PlanError: An option does not fit the model, or no token of the data reached a target.
        StatisticsError: Data that are requested are not given, or activations are not finite.
    """
    held = [(one.penalty, tuple(t for t in plan.targets if one.holds(t.target))) for one in asked]
    held = [(penalty, own) for penalty, own in held if own]
    if not held:
        return plan
    wanted: dict[str, frozenset[Request]] = {t.target.name: frozenset() for t in plan.targets}
    for penalty, own in held:
        wanted |= {t.target.name: wanted[t.target.name] | penalty.requests(t) for t in own}
    statistics = collect(
        runner,
        [t.target for t in plan.targets],
        wanted,
        data,
        store,
        model_fingerprint=model_fingerprint,
        low_memory=low_memory,
    )
    if statistics.unseen:
        raise PlanError(
            f"penalties {', '.join(penalty.name for penalty, _ in held)}",
            got=f"no token of the knowledge that reached {', '.join(sorted(statistics.unseen))}",
            wanted="knowledge that reaches every target",
            next_step="Give more knowledge, or leave these targets out.",
        )
    model = runner.model
    blocks = depth(model)

    def sites(own: Sequence[TargetPlan]) -> Iterator[Site]:
        targets = tuple(t.target for t in own)
        for t in own:
            yield Site(t, read_weight(model, t.target), statistics.view(t.target), targets, blocks)

    made = [_with_texts(penalty, penalty_plan(penalty, sites(own)), model, data) for penalty, own in held]
    said = [f"penalty {one.penalty.name}: {', '.join(one.roles)} only" for one in asked if one.roles]
    for (penalty, own), its in zip(held, made, strict=True):
        said += notes_of(penalty, replace(plan, targets=own), its)
    if any("magnitude" in t.trainable for _, own in held for t in own):
        said.append("penalties hold the change of the directions, s B A; the magnitudes are free")
    if any("bias" in t.trainable for t in plan.targets):
        said.append("penalties on weights hold the change of W, s B A; the biases are free")
    notes = [*plan.provenance.get("notes", ()), *said]
    provenance = {**plan.provenance, "notes": notes} if notes else plan.provenance
    return replace(plan, penalties=tuple(made), provenance=provenance)


def _with_texts(
    penalty: PenaltySpec, made: PenaltyPlan, model: PreTrainedModel, data: Mapping[DataRole, Calibration]
) -> PenaltyPlan:
    """Add the texts that a penalty on answers runs the model on."""
    if not isinstance(penalty, OfOutputs):
        return made
    if head_of(model):
        raise PlanError(
            f"penalty {penalty.name}",
            got="a classifier, whose head is drawn anew: its base has no answers that could be kept",
            wanted="a model that writes text",
            next_step="Take a penalty on the weight change: l2, or laplace with delta-act.",
        )
    return replace(made, tensors={**made.tensors, **penalty.texts(data)})
