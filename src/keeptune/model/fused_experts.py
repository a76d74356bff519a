"""Mixtures of experts whose weights are fused: one parameter ``(experts, ...)`` holds the W of all experts of a block.

Transformers marks such modules (``use_experts_implementation``), says whether W is stored as ``(m, n)`` or ``(n, m)``,
and can compute them in several ways; the eager one goes from expert to expert. Nothing here names an architecture.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from keeptune.core.errors import named
from keeptune.core.offload import device_of

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FusedWeight:
    """A parameter that holds the W of all experts of a block.

    Args:
        module: The path of the module that has it.
        leaf: Its name there, ``"gate_up_proj"``.
        experts: How many.
        out_features: m of one expert.
        in_features: n of one expert.
        transposed: W is stored as ``(n, m)``.
        bias: There is a b.
    """

    module: str
    leaf: str
    experts: int
    out_features: int
    in_features: int
    transposed: bool
    bias: bool

    @property
    def role(self) -> str:
        """What it does in its block, ``"experts.gate_up_proj"``; not the role of a dense map of the same name."""
        return f"{self.module.rpartition('.')[2]}.{self.leaf}"

    def name(self, expert: int) -> str:
        """Returns the name of one expert's W, as if experts were modules."""
        return f"{self.module}.{expert}.{self.leaf}"


def fused_weights(model: PreTrainedModel) -> list[FusedWeight]:
    """Returns the parameters that hold the W of several experts, in model order."""
    found = []
    for name, module in model.named_modules():
        for leaf, weight in _stacks(module).items():
            transposed = bool(module.is_transposed)
            first, second = weight.shape[1:]
            shape = (second, first) if transposed else (first, second)
            found.append(FusedWeight(name, leaf, len(weight), *shape, transposed, hasattr(module, f"{leaf}_bias")))
    return found


def _stacks(module: nn.Module) -> dict[str, Tensor]:
    """Returns the fused weights of a module, by name; packed ones (fp8, mxfp4) are not read."""
    if not hasattr(module, "is_transposed"):
        return {}
    parameters = module.named_parameters(recurse=False)
    return {leaf: p for leaf, p in parameters if p.ndim == 3 and p.is_floating_point() and p.itemsize > 1}


def warn_of_unknown_stacks(model: PreTrainedModel) -> None:
    """Names modules with 3-D weights that are not known to be experts."""
    unknown = [
        name
        for name, module in model.named_modules()
        if any(p.ndim == 3 for p in module.parameters(recurse=False))
        and not isinstance(module, nn.Conv1d)
        and not _stacks(module)
    ]
    if unknown:
        _log.warning(
            "%s: 3-D weights that Transformers does not mark as experts in floats are left alone", named(unknown, 1)
        )


def taken_for_experts(model: PreTrainedModel, names: Collection[str]) -> set[str]:
    """Returns the modules that PEFT takes for fused experts when it adds or loads an adapter, and warns of them.

    In models whose experts were modules in Transformers 4, PEFT renames every target that ends like an expert's map
    (``shared_experts.down_proj``, a dense block's ``mlp.down_proj``): an adapter there would be lost without a word.
    """
    taken = {name for name in names if _renamed(model, {name})} if _renamed(model, names) else set()
    if taken:
        told = named(sorted(taken), 1), version("peft"), model.config.model_type
        _log.warning("%s: left alone, since PEFT %s takes them for fused experts of %s", *told)
    return taken


def _renamed(model: PreTrainedModel, names: Collection[str]) -> bool:
    config = LoraConfig(target_modules=[*names])
    try:
        convert_peft_config_for_transformers(config, model=model, conversions=None)
    except ValueError:  # one of two maps that became one
        return True
    return {*names} != {*(config.target_modules or ())}


@contextmanager
def one_expert_at_a_time(model: PreTrainedModel) -> Iterator[None]:
    """Computes experts one after the other, or where there are no values (meta) in a way that needs none."""
    if not any(_stacks(module) for module in model.modules()):
        yield
        return
    before: Any = model.get_experts_implementation()
    model.set_experts_implementation("batched_mm" if device_of(model).type == "meta" else "eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)
