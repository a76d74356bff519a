"""From a loaded model and data to statistics and a plan: what the job and the Python interface share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from keeptune.core.errors import PlanError
from keeptune.core.plan import Plan
from keeptune.core.target import Target, read_weight
from keeptune.data.calibration import Calibration
from keeptune.methods.base import Method, make_plan
from keeptune.model.blocks import find_targets, head_of
from keeptune.model.head import body_fingerprint
from keeptune.model.load import refuse_not_finite
from keeptune.model.runner import ResidentRunner
from keeptune.stats.collect import Statistics, collect
from keeptune.stats.request import DataRole
from keeptune.stats.store import StatStore

__all__ = ["plan_for", "refuse_layers", "statistics_for"]


def refuse_layers(method: Method[Any], layers: Sequence[int] | None) -> None:
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
    method: Method[Any],
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
        roles: Roles of the targets; None is all linear maps but the head.
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
    targets = find_targets(model, roles, layers)
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
    method: Method[Any],
    store: StatStore,
    *,
    data: Mapping[DataRole, Calibration],
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
        roles: Roles of the targets; None is all linear maps but the head.
        layers: Blocks of the targets; None is all.
        fingerprint: Of the model's weights, if it is known already.
        low_memory: Hold no more covariances at a time than take the memory of the largest.
        provenance: What the plan was made from, for the record.

    Returns:
        The plan.

    Raises:
        PlanError: A role or a block does not exist, or an option does not fit a target or the blocks.
        ModelError: A weight is NaN or infinite.
        StatisticsError: Data that are requested are not given, or activations are not finite.
    """
    refuse_not_finite(model)
    fingerprint = fingerprint or body_fingerprint(model)
    targets, statistics = statistics_for(
        model, method, store, data=data, roles=roles, layers=layers, fingerprint=fingerprint, low_memory=low_memory
    )
    made_from = {"model": fingerprint, **(provenance or {})}
    if statistics.unseen:
        names = ", ".join(sorted(statistics.unseen))
        made_from["notes"] = [*made_from.get("notes", ()), f"no token of the data reached {names}: left alone"]
    return make_plan(
        method,
        targets,
        lambda target: read_weight(model, target),
        statistics.view,
        head=head_of(model),
        provenance=made_from,
    )
