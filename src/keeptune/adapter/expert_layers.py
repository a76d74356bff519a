"""PEFT's layer for a parameter that holds the W of several experts: which part of its factors is whose.

    ΔW_e = s B_e A_e         lora_A ``(E r, n)``: the rows of A_e follow each other
                             lora_B ``(m, r E)``: the first columns of all experts, then the second ones

All experts have one rank there. One with a smaller rank in the plan, or with none, has zeros in the place of both
factors, whose gradients are then zero: it stays as it is. For each parameter of a module, PEFT nests another layer.
"""

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from keeptune.core.low_rank import LowRank
from keeptune.core.plan import TargetPlan
from keeptune.core.target import TRAINED_TENSORS, Target, TensorName


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """A tensor of a target's change as it is held in the model: a parameter, or one expert's part of it."""

    parameter: nn.Parameter
    factor: TensorName
    target: Target
    rank: int

    def of(self, whole: Tensor) -> Tensor:
        """Returns the target's part of the parameter's value, or of its gradient, as a view."""
        expert, experts = self.target.expert, self.target.experts
        if expert is None:
            return whole
        if self.factor == "A":
            return whole.view(experts, -1, whole.shape[1])[expert, : self.rank]
        return whole.view(len(whole), -1, experts)[:, : self.rank, expert]

    def add(self, total: dict[nn.Parameter, Tensor], gradient: Tensor) -> None:
        """Adds a gradient of the target's part to those of whole parameters."""
        if self.target.expert is None:
            total[self.parameter] = total[self.parameter] + gradient if self.parameter in total else gradient
            return
        if self.parameter not in total:
            total[self.parameter] = torch.zeros(self.parameter.shape, dtype=gradient.dtype, device=gradient.device)
        self.of(total[self.parameter]).add_(gradient)


def held_in(layer: Any, target_plan: TargetPlan, factor: TensorName, adapter: str = "default") -> Held:
    """Returns where a PEFT layer holds a tensor of a target."""
    parameter = layer.get_parameter(TRAINED_TENSORS[factor].parameter.replace("default", adapter))
    return Held(parameter, factor, target_plan.target, target_plan.decision.rank)


def layer_path(model: PeftModel, target: Target) -> str:
    """Returns the path of the PEFT layer of a target in the model that was wrapped."""
    path = target.module
    if target.expert is None:
        return path
    layer: Any = model.base_model.model.get_submodule(path)
    while isinstance(layer, ParamWrapper) and layer.parameter_name != target.parameter.rpartition(".")[2]:
        layer, path = layer.base_layer, f"{path}.base_layer"
    return path


@contextmanager
def patterns_of_parameters() -> Iterator[None]:
    """Leaves out a warning of PEFT's, which looks for ranks of parameters among the modules, and does apply them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"The following \w+_pattern keys did not match any targeted module")
        yield


def saved_factors(experts: Sequence[TargetPlan], weights: Mapping[str, LowRank]) -> tuple[int, Tensor, Tensor]:
    """Puts the changes of the experts of one parameter side by side as PEFT saves them, with zeros for the others.

    Returns:
        The rank, ``lora_A`` and ``lora_B``.
    """
    own = {t.target.expert: weights[t.target.name] for t in experts}
    rank, target = max(part.rank for part in own.values()), experts[0].target
    none = LowRank(B=torch.zeros(target.out_features, 0), A=torch.zeros(0, target.in_features))
    every = [own.get(index, none).padded(rank) for index in range(target.experts)]
    B = torch.stack([part.B for part in every], dim=2).flatten(1)
    return rank, torch.cat([part.A for part in every]), B


def saved_names(parameters: Iterable[str]) -> dict[str, str]:
    """Returns the names that PEFT saves the layers of parameters under, given in the order of the model."""
    modules: dict[str, list[str]] = {}
    for parameter in parameters:
        modules.setdefault(parameter.rpartition(".")[0], []).append(parameter)
    return {
        parameter: module + ".base_layer" * depth
        for module, own in modules.items()
        for depth, parameter in enumerate(reversed(own))
    }
