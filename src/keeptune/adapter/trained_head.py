"""A classifier's head beside the adapter: trained in full, in PEFT's ``modules_to_save``, and part of the adapter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from keeptune.core.plan import Plan


def head_names(plan: Plan) -> tuple[str, ...]:
    """Returns the names of the modules that are trained in full; none for a language model."""
    return tuple(plan.peft.get("modules_to_save") or ())


def task_type(plan: Plan) -> str:
    """Returns PEFT's kind of task: ``"SEQ_CLS"`` with a head, else ``"CAUSAL_LM"``."""
    return "SEQ_CLS" if head_names(plan) else "CAUSAL_LM"


def labels_of(model: PreTrainedModel | PeftModel) -> list[str] | None:
    """Returns a classifier's labels in the order of the outputs; empty for a score, None for a language model."""
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    if not type(base).__name__.endswith("ForSequenceClassification"):
        return None
    names = base.config.id2label
    return [names[index] for index in sorted(names)] if len(names) > 1 else []


def keep_precise(model: PeftModel, plan: Plan) -> None:
    """Converts the head to float32, as the factors are: small updates to 16-bit weights round away."""

    def widen(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(part.float() if isinstance(part, Tensor) and part.is_floating_point() else part for part in inputs)

    for module in _heads(model, plan).values():
        if any(parameter.dtype != torch.float32 for parameter in module.parameters()):
            module.to(torch.float32).register_forward_pre_hook(widen)


def trained_head(model: PeftModel, plan: Plan) -> dict[str, Tensor]:
    """Returns the head as it is now, float32 on the CPU, by the names of its parameters and buffers in the base."""
    return {
        f"{name}.{key}": value.detach().to("cpu", torch.float32, copy=True)
        for name, module in _heads(model, plan).items()
        for key, value in module.state_dict().items()
    }


def put_head(model: PreTrainedModel | PeftModel, plan: Plan, values: Mapping[str, Tensor]) -> None:
    """Puts a trained head into an installed model, or in the place of a base's own; other names are left aside."""
    for name, module in _heads(model, plan).items():
        prefix = f"{name}."
        module.load_state_dict({key.removeprefix(prefix): v for key, v in values.items() if key.startswith(prefix)})


def _heads(model: PreTrainedModel | PeftModel, plan: Plan) -> dict[str, nn.Module]:
    if not isinstance(model, PeftModel):
        return {name: model.get_submodule(name) for name in head_names(plan)}
    return {name: model.base_model.model.get_submodule(f"{name}.modules_to_save.default") for name in head_names(plan)}
