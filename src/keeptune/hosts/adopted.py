"""The plan of a LoRA that is there already: a plain one, not trained yet, as PEFT or a trainer made it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from keeptune.core.errors import TrainError, named
from keeptune.core.low_rank import LowRank
from keeptune.core.plan import Decision, Plan, TargetPlan
from keeptune.core.target import Target
from keeptune.data.calibration import Calibration
from keeptune.methods.base import Method, dropout_field
from keeptune.methods.lora import LoraStart
from keeptune.model.blocks import find_targets, head_of
from keeptune.model.head import body_fingerprint
from keeptune.penalties.base import Penalty
from keeptune.statistics.request import DataRole

# Fields of LoraConfig that say which modules, and of which size; any other makes more of it than A and B.
_FREE = {
    *("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights"),
    *("peft_type", "task_type", "inference_mode", "base_model_name_or_path", "revision", "peft_version"),
    *("auto_mapping", "runtime_config"),
}
_BOTH = frozenset({"A", "B"})
_BEFOREHAND = (
    "Make it beforehand: plan = keeptune.plan(model, tokenizer, {}, knowledge=texts), then "
    "tuned = keeptune.install(model, plan) for the trainer, and callbacks=[keeptune.Callback(plan=plan)]."
)
_LORA = "Pass peft_config=LoraConfig(...) to the trainer, or get_peft_model(model, LoraConfig(...))."


def refuse_start(method: Method, penalties: Sequence[Penalty], knowledge: Any) -> None:
    """Raises TrainError for a method that has another start than a plain LoRA, or where there is no knowledge."""
    if not isinstance(method, LoraStart) or method.trains != _BOTH or method.training():
        got, wanted = "a start of its own, before there is an adapter", "its plan, or a method that starts as LoRA does"
        next_step = _BEFOREHAND.format(f"keeptune.{type(method).__name__}(...)")
        raise TrainError(f"keeptune.Callback, method {method.name}", got=got, wanted=wanted, next_step=next_step)
    if knowledge is None and any("knowledge" in one.data for one in penalties):
        wanted = f"texts that hold what the model should keep, for {named([one.name for one in penalties])}"
        next_step = "Pass knowledge=texts; keeptune.generate_knowledge(model, tokenizer) has the base write some."
        raise TrainError("keeptune.Callback, knowledge", got="none", wanted=wanted, next_step=next_step)


@contextmanager
def without_adapter(model: PeftModel) -> Iterator[tuple[PreTrainedModel, dict[str, Any]]]:
    """Takes the layers of an adapter out for a while: yields the base as it was, not a copy, and them by name."""
    base: Any = model.get_base_model()
    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    wrapped: dict[str, Any] = {name: module for name, module in base.named_modules() if isinstance(module, kinds)}
    layers = {name: module for name, module in wrapped.items() if isinstance(module, BaseTunerLayer)}

    def put(name: str, module: Any) -> None:
        parent, _, child = name.rpartition(".")
        setattr(base.get_submodule(parent), child, module)

    try:
        for name, module in wrapped.items():
            put(name, module.get_base_layer() if name in layers else module.original_module)
        yield base, layers
    finally:
        for name, module in wrapped.items():
            put(name, module)


def refuse_adapter(model: PreTrainedModel | PeftModel, *, plain: bool) -> None:
    """Raises TrainError for a model without an adapter; where it is to be a plain LoRA, also for one that is more."""
    if not isinstance(model, PeftModel):
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        raise _refused(f"{type(model).__name__} without an adapter, in which {trained:,} numbers are trained", _LORA)
    if not model.get_base_model().name_or_path:
        raise _refused("a base of no path or hub id", "Load it by from_pretrained: the export is checked on it.")
    if not plain:
        return
    if model.active_adapters != ["default"]:
        raise _refused(f"the active adapters {named(model.active_adapters)}", "Have one active, and name it default.")
    config = model.peft_config["default"]
    if not isinstance(config, LoraConfig):
        raise _refused(f"an adapter of the kind {config.peft_type}", _LORA)
    usual = type(config)()  # of a host's own class, with fields of its own
    head = bool(head_of(model.get_base_model()))
    special = [
        f"{field}={value!r}"
        for field, value in vars(config).items()
        if field not in _FREE
        and (value or None) != (getattr(usual, field, None) or None)
        and not (head and field == "modules_to_save")
    ]
    if config.init_lora_weights not in (True, "gaussian"):
        special.append(f"init_lora_weights={config.init_lora_weights!r}")
    if special:
        raise _refused(f"a LoRA with {named(special)}", f"Leave it out. {_BEFOREHAND.format('method')}")
    if any(isinstance(parameter.data, DTensor) for parameter in model.parameters()):
        raise _refused("a model in shards", _BEFOREHAND.format("method"))


def adopted_plan(
    base: PreTrainedModel,
    layers: Mapping[str, Any],
    config: LoraConfig,
    method: Method,
    data: Mapping[DataRole, Calibration],
) -> Plan:
    """Makes the plan, without penalties, of an adapter that was taken out of its base: the factors as they are.

    Raises:
        TrainError: It tunes what is no linear map, or has been trained already.
    """
    known = {target.name: target for target in find_targets(base)}
    for name, layer in layers.items():
        if name not in known:
            raise _refused(f"a LoRA on {name}, no linear map of a block", "Leave it out of target_modules.")
        if bool(layer.lora_B["default"].weight.any()):
            got = f"a LoRA that has been trained already: B of {name} is not zero"
            raise _refused(got, "Merge it into the base (merge_and_unload), or resume its checkpoint by train().")
    head, given = head_of(base), {"rank": config.r, "alpha": config.lora_alpha, "dropout": config.lora_dropout}
    return Plan(
        method=method.name,
        options=method.options() | given,
        targets=tuple(_adopted(target, layers[name]) for name, target in known.items() if name in layers),
        peft=dropout_field(config.lora_dropout) | ({"modules_to_save": list(head)} if head else {}),
        provenance={"model": body_fingerprint(base)} | {role: tokens.fingerprint for role, tokens in data.items()},
    )


def _adopted(target: Target, layer: Any) -> TargetPlan:
    A, B = (getattr(layer, name)["default"].weight.detach().float().cpu().clone() for name in ("lora_A", "lora_B"))
    return TargetPlan(target, Decision(len(A)), LowRank(B=B, A=A), layer.scaling["default"], _BOTH)


def _refused(got: str, next_step: str) -> TrainError:
    wanted = "a plain LoRA of PEFT's, not trained yet"
    return TrainError("keeptune.Callback, model", got=got, wanted=wanted, next_step=next_step)
