"""install: a plan into a model that the user has, as a stock PeftModel, and its trained state out of it."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import get_bnb_param_type
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from keeptune.adapter.anchor import ANCHOR_NAME, Anchor, apply_anchor, keep_active, resolve
from keeptune.adapter.expert_layers import Held, held_in, layer_path, patterns_of_parameters
from keeptune.adapter.special_layers import prepare
from keeptune.adapter.trained_head import full, keep_precise, put_head, task_type, trained_head, trained_head_names
from keeptune.core.errors import PlanError, TrainError
from keeptune.core.plan import Plan, TargetPlan
from keeptune.core.target import TRAINED_TENSORS, Target, TensorName
from keeptune.core.weights import is_quantised, keep_layout, refuse_quantised, weight_shape


def install(model: PreTrainedModel, plan: Plan, *, anchor: Anchor = "auto") -> PreTrainedModel | PeftModel:
    """Puts a plan into a model, which computes what it did before, to rounding.

    Stock PEFT layers, no custom forward: any trainer, merger or server that knows PEFT can go on from here.
    Frozen factors stay frozen through ``set_adapter``, reload and resume.

    Args:
        model: The base model the plan was made for; it is changed in place.
        plan: The plan. One with scope ``"all"`` makes every weight trainable and adds nothing.
        anchor: How a start that is a part of W is taken out of W (:mod:`keeptune.adapter.anchor`).

    Raises:
        PlanError: The plan was made for another model, or the model is already wrapped by PEFT.
    """
    _check_fits(model, plan)
    keep_layout(model)
    quantised = is_quantised(model)
    if quantised:
        refuse_quantised(plan.scope, plan.method)
        _refuse_lost_scales(model, plan)
    if plan.scope == "all":
        # Small updates to 16-bit weights round away; adapters are trained in float32, so the reference is too.
        return model.to(torch.float32).requires_grad_(True)
    kind = resolve(anchor, model.dtype, quantised=quantised)
    anchored = any(t.anchored for t in plan.targets)
    fused = any(t.anchored for own in plan.experts.values() for t in own)  # PEFT wants all in the twin, or none
    twins = [t for t in plan.targets if t.anchored or (fused and t.target.expert is not None)]
    _refuse_rounded_experts(model, plan)
    peft = dict(plan.peft)
    peft.pop("task_type", None)
    # get_peft_model draws factors that are overwritten below; the caller's random state is left alone.
    with torch.random.fork_rng(), patterns_of_parameters():
        wrapped = get_peft_model(model, _config(plan, plan.targets, peft))
        assert isinstance(wrapped, PeftModel)
        if anchored and kind == "twin":
            # PeftModel's own: the one for classifiers would give the twin a head, and two heads cannot be active.
            PeftModel.add_adapter(wrapped, ANCHOR_NAME, _config(plan, twins, {}))
    keep_precise(wrapped, plan)
    for experts in plan.experts.values():
        layer = layer_of(wrapped, experts[0].target)
        for module in (*layer.lora_A.values(), *layer.lora_B.values()):
            nn.init.zeros_(module.weight)
    for target_plan in plan.targets:
        layer = layer_of(wrapped, target_plan.target)
        prepare(layer, target_plan)
        with torch.no_grad():
            for factor, value in target_plan.start.items():
                held = held_in(layer, target_plan, factor)
                held.of(held.parameter).copy_(value)
        if target_plan.anchored:
            apply_anchor(layer, target_plan, kind)
        _freeze(layer, target_plan)
    if anchored and kind == "twin":
        keep_active(wrapped)
    return wrapped


def lora_layer(model: PeftModel, name: str) -> Any:
    """Returns the PEFT layer that wraps a target."""
    return model.base_model.model.get_submodule(name)


def layer_of(model: PeftModel, target: Target) -> Any:
    """Returns the PEFT layer that holds a target's change; experts of one parameter share it."""
    return lora_layer(model, layer_path(model, target))


def trained_state(model: PeftModel, plan: Plan) -> dict[str, Tensor]:
    """Returns what a plan put into a model as it is now, float32 on the CPU, without scale or anchor.

    Names are ``"model.layers.0.mlp.up_proj.B"`` and the like; frozen factors are among them, and a classifier's head.
    Where the model is sharded (FSDP2), every process must call it: the shards are gathered.
    """
    # Copies: on the CPU they would else change with the model.
    return {
        f"{t.target.name}.{factor}": held.of(full(held.parameter.detach())).to("cpu", torch.float32, copy=True)
        for t in plan.targets
        for factor, held in held_parameters(model, t).items()
    } | trained_head(model, plan)


def restore_state(model: PeftModel, plan: Plan, state: Mapping[str, Tensor]) -> None:
    """Puts the state of a trained model, from :func:`trained_state`, back into an installed one."""
    with torch.no_grad():
        for target_plan in plan.targets:
            for factor, held in held_parameters(model, target_plan).items():
                held.of(held.parameter).copy_(state[f"{target_plan.target.name}.{factor}"])
    put_head(model, plan, state)


def trained_names(model: PeftModel, plan: Plan) -> set[str]:
    """Returns the names of the parameters that a plan trains, as in ``named_parameters()`` of the installed model."""
    factors = {
        f"{layer_path(model, t.target)}.{TRAINED_TENSORS[name].parameter}" for t in plan.targets for name in t.trainable
    }
    return {f"base_model.model.{name}" for name in factors | trained_head_names(model, plan)}


def held_parameters(model: PeftModel, target_plan: TargetPlan) -> dict[TensorName, Held]:
    """Returns where a target's change is held: what is trained, and a frozen factor of the same product."""
    held = target_plan.trainable | {"A", "B"}
    layer = layer_of(model, target_plan.target)
    return {name: held_in(layer, target_plan, name) for name in TRAINED_TENSORS if name in held}


def starting_values(model: PeftModel, plan: Plan) -> dict[nn.Parameter, Tensor]:
    """Returns the plan's start of every parameter that holds a part of a change."""
    values: dict[nn.Parameter, Tensor] = {}
    for target_plan in plan.targets:
        for factor, held in held_parameters(model, target_plan).items():
            held.add(values, target_plan.start[factor])
    return values


def sharded_like(value: Tensor, parameter: nn.Parameter) -> Tensor:
    """Returns this process's shard of a tensor that all have, as of a parameter; all of it where that is whole."""
    like = parameter.data
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def check_frozen(model: PeftModel, plan: Plan) -> None:
    """Raises TrainError unless exactly the factors that the plan trains are trainable, and a classifier's head."""
    expected = trained_names(model, plan)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    if trainable != expected:
        wrong = sorted(trainable ^ expected)
        raise TrainError(
            f"parameter {wrong[0]}" + (f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""),
            got="trainable" if wrong[0] in trainable else "frozen",
            wanted="the opposite, by the plan",
            next_step="Do not change requires_grad between install and training.",
        )


def _refuse_rounded_experts(model: PreTrainedModel, plan: Plan) -> None:
    """Refuses a start in experts of a 16-bit base: PEFT rounds the start and its twin, each by itself, to 16 bits."""
    own = [t for experts in plan.experts.values() for t in experts if t.anchored]
    if own and model.dtype != torch.float32:
        raise PlanError(
            f"install, target {own[0].target.name}",
            got=f"an expert of a {str(model.dtype).removeprefix('torch.')} base that starts from a part of W",
            wanted="float32, or a start at zero: PEFT rounds that part to the base's dtype at each step",
            next_step="Set `dtype: float32`, take lora or keep, or leave the roles of the experts out of `targets`.",
        )


def _stored_shape(model: PreTrainedModel, target: Target) -> tuple[int, ...]:
    """Returns the shape of an expert's W; where it is stored the other way round than planned, that of the whole."""
    parameter = model.get_parameter(target.parameter)
    same = model.get_submodule(target.module).is_transposed == target.transposed
    return tuple((target.view(parameter) if same and len(parameter) == target.experts else parameter).shape)


def _config(plan: Plan, targets: Sequence[TargetPlan], extra: Mapping[str, Any]) -> LoraConfig:
    ranks, alphas = dict[str, int](), dict[str, float]()
    for t in targets:
        name = t.target.name if t.target.expert is None else t.target.parameter
        ranks[name] = max(t.decision.rank, ranks.get(name, 0))
        alphas[name] = t.scale * ranks[name]
    rank, alpha = max(ranks.values()), max(alphas.values())
    parameters = {t.target.parameter for t in targets if t.target.expert is not None}
    return LoraConfig(
        task_type=task_type(plan),
        r=rank,
        lora_alpha=alpha,
        target_modules=[name for name in ranks if name not in parameters],
        target_parameters=sorted(parameters) or None,
        rank_pattern={name: r for name, r in ranks.items() if r != rank},
        alpha_pattern={name: a for name, a in alphas.items() if a != alpha},
        fan_in_fan_out=any(t.target.transposed for t in targets if t.target.expert is None),
        **copy.deepcopy(dict(extra)),  # PEFT adds to the list of modules_to_save
    )


def _freeze(layer: Any, target_plan: TargetPlan) -> None:
    # PEFT re-applies this list in set_adapter and load_adapter, where it would else unfreeze everything.
    frozen = {"default": tuple(f"lora_{f}" for f in ("A", "B") if f not in target_plan.trainable)}
    if "bias" in target_plan.trainable:
        frozen["default"] = tuple("lora_B_weight" if name == "lora_B" else name for name in frozen["default"])
    if ANCHOR_NAME in layer.lora_A:
        frozen[ANCHOR_NAME] = ("lora_A", "lora_B")
    layer.frozen_peft_weight_names = {name: weights for name, weights in frozen.items() if weights}
    layer._freeze_non_trainable_peft_weights(list(frozen))


def _refuse_lost_scales(model: PreTrainedModel, plan: Plan) -> None:
    """Refuses DoRA in eight bits on the CPU: reading W in its forward pass, PEFT 0.21 drops the scales there."""
    for target_plan in plan.targets:
        weight: Any = getattr(model.get_submodule(target_plan.target.module), "weight", None)
        if "magnitude" in target_plan.vectors and get_bnb_param_type(weight) == "8bit" and weight.device.type == "cpu":
            raise PlanError(
                f"method {plan.method}, target {target_plan.target.name}",
                got="a base in eight bits on the CPU, of which PEFT loses the scales in DoRA's forward pass",
                wanted="four bits, or a GPU",
                next_step="Set load_in_4bit, or take another method.",
            )


def _check_fits(model: PreTrainedModel, plan: Plan) -> None:
    # get_peft_model changes the model it is given, so the model itself may hold adapters without its wrapper.
    if isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise PlanError(
            "install",
            got="a model already wrapped by PEFT",
            wanted="the base model",
            next_step="Merge and unload its adapter, or load the base again.",
        )
    for target_plan in plan.targets:
        target = target_plan.target
        shape = (target.out_features, target.in_features)
        stored: tuple[int, ...] | None
        try:
            if target.expert is None:
                stored = weight_shape(model.get_submodule(target.name))
            else:
                stored = _stored_shape(model, target)
        except (AttributeError, IndexError):
            stored = None
        if stored != shape:
            raise PlanError(
                f"install, target {target.name}",
                got="no such module" if stored is None else f"a weight of shape {stored}",
                wanted=f"shape {shape}",
                next_step="The plan was made for another model; make a plan for this one.",
            )
