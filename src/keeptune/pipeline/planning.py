"""From a loaded model and data to statistics and a plan: what the job and the Python interface share."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from keeptune.adapter.trained_head import TokenIndices, trained_beside
from keeptune.core.errors import PlanError, named
from keeptune.core.low_rank import LowRank
from keeptune.core.out_of_memory import out_of_memory
from keeptune.core.plan import Decision, Plan, TargetPlan
from keeptune.core.target import Target
from keeptune.core.weights import is_quantised, read_weight, refuse_misread, refuse_quantised
from keeptune.data.calibration import Calibration
from keeptune.methods.base import Method, make_plan, refuse_experts
from keeptune.model.blocks import depth, find_targets, head_of
from keeptune.model.head import body_fingerprint
from keeptune.model.pretrained import StartFrom, refuse_not_finite
from keeptune.model.runner import Runner
from keeptune.penalties.base import Penalty, Site, penalty_plan
from keeptune.penalties.kl import Kl
from keeptune.pipeline.originals import Memory, placed_runner, weight_reader
from keeptune.statistics.collect import Statistics, collect
from keeptune.statistics.request import DataRole, Request
from keeptune.statistics.store import DEFAULT_LIMIT, StatStore


@dataclass(frozen=True)
class PlanOptions:
    """Which targets are planned, and how their statistics are collected.

    Args:
        targets: Roles, such as ``["q_proj", "down_proj"]``; None is all linear maps but the head.
        layers: Indices of the blocks to tune, such as ``[4, 5, 6, 7]``; None is all.
        memory: ``"resident"`` runs the whole model, with as many sums at a time as fit; ``"blockwise"`` has one block
            on the device at a time; ``"auto"`` decides from the memory that is free.
        device: Where blocks run under ``"blockwise"``; None is where the model is.
        max_length: Texts given to :func:`keeptune.plan` are cut to this many tokens, or to the model's positions.
        end_token: Whether the end-of-text token is learned after each completion of the ``task`` that
            :func:`keeptune.plan` is given, where it does not end so already; a trainer usually adds it.
        store: Folder where :func:`keeptune.plan` keeps statistics for later plans; None keeps them for one call.
        store_limit: Bytes of that folder; the least recently used statistics go first.
        fingerprint: Of the model's weights, where it is known already.
        provenance: What the plan is made from, for the record.
        start_from: Which weights of a quantised base the method reads, for its starts and its scores: those that it
            computes with, dequantised, or the ``"original"`` ones.
        original: The base before it was quantised, by path or hub id, or loaded; its weights may be on disk.
        modules_to_save: Modules to train in full beside the targets, such as ``["embed_tokens"]``; PEFT's field.
        trainable_token_indices: Ids of tokens whose rows of the embedding are trained, or by module; PEFT's field.
    """

    targets: Sequence[str] | None = None
    layers: Sequence[int] | None = None
    memory: Memory = "auto"
    device: str | None = None
    max_length: int = 1024
    end_token: bool = True
    store: Path | str | None = None
    store_limit: int = DEFAULT_LIMIT
    fingerprint: str | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    start_from: StartFrom = "quantised"
    original: PreTrainedModel | str | None = None
    modules_to_save: Sequence[str] | None = None
    trainable_token_indices: TokenIndices | None = None


_DEFAULTS = PlanOptions()


def penalties_of(method: Method, extra: Sequence[Penalty] = ()) -> tuple[Penalty, ...]:
    """Lists the penalties of a run: the method's own, then others; those of strength 0 are left out."""
    return tuple(one for one in (*method.penalties(), *extra) if one.strength > 0)


def refuse_scope(method: Method, penalties: Sequence[Penalty], layers: Sequence[int] | None) -> None:
    """Refuses penalties and layers that a method cannot have.

    Raises:
        PlanError: The method trains no factors, or every weight; or there are two penalties of one name in reports.
    """
    names = [one.name for one in penalties]
    twice = next((one.name for one in penalties if one.once and names.count(one.name) > 1), "")
    adapters = "or take a method that trains adapters."
    for wrong, got, wanted, next_step in (
        (
            penalties and method.scope != "adapter",
            f"the penalties {', '.join(names)}",
            "no `penalties`: it changes whole weights, and penalties act on low-rank factors",
            f"Leave `penalties` out, {adapters}",
        ),
        (
            twice,
            f"{names.count(twice)} penalties {twice}",
            "one: their logs and notes would have the same names",
            "Leave one out.",
        ),
        (
            layers is not None and method.scope == "all",
            f"layers {list(layers or ())}",
            "no `layers`: it trains every weight of the model",
            f"Leave `layers` out (or set it to null), {adapters}",
        ),
    ):
        if wrong:
            raise PlanError(f"method {method.name}", got=got, wanted=wanted, next_step=next_step)


def statistics_for(
    model: PreTrainedModel,
    method: Method,
    store: StatStore,
    *,
    data: Mapping[DataRole, Calibration],
    options: PlanOptions = _DEFAULTS,
) -> tuple[list[Target], Statistics]:
    """Collects what a method requests of a model; what the store has is not computed again.

    Returns:
        The targets and access to their statistics; experts that no token reached are left out.

    Raises:
        PlanError: A role or a block does not exist, or the method cannot be confined to blocks, or not tune experts.
        StatisticsError: Data that are requested are not given, or activations are not finite.
    """
    refuse_scope(method, (), options.layers)
    method = method.fitted(depth(model))
    targets = find_targets(model, options.targets, options.layers)
    refuse_experts(method, targets)
    requests = {target: method.requests(target) for target in targets}
    statistics = collect_for(Runner(model), requests, data, store, options)
    return [target for target in targets if target.name not in statistics.unseen], statistics


@out_of_memory("statistics")
def collect_for(
    runner: Runner,
    requests: Mapping[Target, frozenset[Request]],
    data: Mapping[DataRole, Calibration],
    store: StatStore,
    options: PlanOptions,
) -> Statistics:
    """Collects what targets request; what the store has is not computed again.

    Raises:
        StatisticsError: Data that are requested are not given, or activations are not finite.
    """
    fingerprint = options.fingerprint or body_fingerprint(runner.model)
    runner, sum_bytes = placed_runner(runner, requests, options.memory, options.device)
    found = collect(runner, requests, data, store, model_fingerprint=fingerprint, sum_bytes=sum_bytes)
    store.note_model(fingerprint, runner.model.name_or_path)
    return found


@out_of_memory("plan")
def plan_for(
    model: PreTrainedModel,
    method: Method,
    store: StatStore,
    *,
    data: Mapping[DataRole, Calibration],
    penalties: Sequence[Penalty] = (),
    options: PlanOptions = _DEFAULTS,
) -> Plan:
    """Makes a method's plan for a model, collecting what it and the penalties besides its own need.

    Raises:
        PlanError: A role or a block does not exist, an option does not fit a target or the blocks, or the method
            takes no penalties.
        ModelError: A weight is NaN or infinite.
        StatisticsError: Data that are requested are not given, or activations are not finite.
    """
    if is_quantised(model):
        refuse_quantised(method.scope, method.name)
        refuse_misread(model)
    refuse_not_finite(model)
    options = replace(options, fingerprint=options.fingerprint or body_fingerprint(model))
    method = method.fitted(depth(model))
    penalties = penalties_of(method, penalties)
    refuse_scope(method, penalties, options.layers)
    weight_of = weight_reader(model, method, options.start_from, options.original)
    targets, statistics = statistics_for(model, method, store, data=data, options=options)
    provenance = {"model": options.fingerprint, **options.provenance}
    if options.start_from != "quantised":
        provenance["start_from"] = options.start_from
    if statistics.unseen:
        names = named(sorted(statistics.unseen))
        provenance["notes"] = [*provenance.get("notes", ()), f"no token of the data reached {names}: left alone"]
    plan = make_plan(method, targets, weight_of, statistics.view, head=head_of(model), provenance=provenance)
    modules, tokens = options.modules_to_save, options.trainable_token_indices
    if modules or tokens:
        if plan.scope != "adapter" or head_of(model):
            raise PlanError(
                "modules_to_save" if modules else "trainable_token_indices",
                got="a classifier, whose head is trained already" if head_of(model) else f"method {plan.method}",
                wanted="a language model, and a method that trains adapters",
                next_step="Leave it out.",
            )
        peft = {**plan.peft, **trained_beside(model, modules, tokens, [t.target.name for t in plan.targets])}
        free = "penalties on weights hold the targets; what is trained beside is free"
        notes = [*plan.provenance.get("notes", ()), free]
        plan = replace(plan, peft=peft, provenance={**plan.provenance, "notes": notes})
    return with_penalties(plan, penalties, Runner(model), store, data=data, options=options)


def starting_from(targets: Iterable[Target], changes: Mapping[str, LowRank]) -> tuple[TargetPlan, ...]:
    """Plans targets that start from changes, by target name: the installed plan computes what the changed model does.

    Both factors are trained, and nothing is taken out of W.
    """
    both = frozenset({"A", "B"})
    own = [(target, changes[target.name]) for target in targets]
    return tuple(TargetPlan(t, Decision(c.rank), init=c, scale=1.0, trainable=both, added=True) for t, c in own)


def with_penalties(
    plan: Plan,
    penalties: Sequence[Penalty],
    runner: Runner,
    store: StatStore,
    *,
    data: Mapping[DataRole, Calibration],
    options: PlanOptions = _DEFAULTS,
) -> Plan:
    """Adds penalties to a plan, collecting what they need; only now, for curvature may be taken at its factors.

    Raises:
        PlanError: An option does not fit the model, or no token of the data reached a target.
        StatisticsError: Data that are requested are not given, or activations are not finite.
    """
    if not penalties:
        return plan
    model = runner.model
    requests = {t.target: frozenset[Request]().union(*(one.requests(t) for one in penalties)) for t in plan.targets}
    statistics = collect_for(runner, requests, data, store, options)
    held, free = [], []
    for penalty in penalties:  # what experts that no token reached put out on the knowledge could not be held
        unseen = statistics.unseen
        lost = {t.target.name for t in plan.targets if penalty.requests(t) & unseen.get(t.target.name, frozenset())}
        if len(lost) == len(plan.targets):
            raise PlanError(
                f"penalty {penalty.name}",
                got="no token of the knowledge that reached one of its targets",
                wanted="knowledge that reaches some of them",
                next_step="Add knowledge, or take other `targets`.",
            )
        if lost:
            names = named(sorted(lost))
            free.append(f"penalty {penalty.name}: no token of the knowledge reached {names}: trained, held by nothing")
        held.append((penalty, tuple(t for t in plan.targets if t.target.name not in lost)))
    plans = []
    blocks = depth(model)
    for penalty, own in held:
        targets = tuple(t.target for t in own)

        def site_of(planned: TargetPlan, targets: tuple[Target, ...] = targets) -> Site:
            target = planned.target
            return Site(planned, read_weight(model, target), statistics.view(target), targets, blocks)

        if isinstance(penalty, Kl) and head_of(model):
            raise PlanError(
                f"penalty {penalty.name}",
                got="a classifier, whose head is drawn anew: its base has no answers that could be kept",
                wanted="a model that writes text",
                next_step="Take a penalty on the weight change, with `method: lora`: l2, or laplace with delta-act.",
            )
        made = penalty_plan(penalty, own, site_of)
        texts = penalty.texts(data) if isinstance(penalty, Kl) else {}  # what it runs the model on
        plans.append(replace(made, tensors={**made.tensors, **texts}))
    notes = [*plan.provenance.get("notes", ()), *free]
    for (penalty, own), made in zip(held, plans, strict=True):
        notes += penalty.notes(replace(plan, targets=own), made.tensors)
    if any("magnitude" in t.trainable for _, own in held for t in own):
        notes.append("penalties hold the change of the directions, s B A; the magnitudes are free")
    if any("bias" in t.trainable for t in plan.targets):
        notes.append("penalties on weights hold the change of W, s B A; the biases are free")
    provenance = {**plan.provenance, "notes": notes} if notes else plan.provenance
    return replace(plan, penalties=tuple(plans), provenance=provenance)
