"""Target: one linear map y = W x + b of a model, and the tensors that a method can train there."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

TensorName = str


@dataclass(frozen=True, slots=True)
class Target:
    """One linear map ``y = W x + b`` of the model, with ``W`` of shape ``(out_features, in_features)``.

    Args:
        name: The module's path, ``"model.layers.7.mlp.down_proj"``; of an expert in a fused parameter,
            ``"model.layers.7.mlp.experts.3.down_proj"``.
        layer: Index of its block; -1 outside any block.
        role: What it does in its block; equal over blocks. Methods match roles, never pieces of names.
        out_features: m.
        in_features: n.
        input_group: Equal for targets fed by the same tensor (q/k/v; gate/up): they share one covariance.
        transposed: The module stores ``W`` as ``(in_features, out_features)``, as GPT-2's Conv1D does.
        bias: There is a b.
        expert: Index in a parameter that holds the W of all experts of a block; None for a module.
        experts: How many there are in that parameter.
    """

    name: str
    layer: int
    role: str
    out_features: int
    in_features: int
    input_group: str
    transposed: bool = False
    bias: bool = False
    expert: int | None = None
    experts: int = 1

    @property
    def module(self) -> str:
        """The path of the module that holds W: for an expert, that of all experts of its block."""
        return self.name if self.expert is None else self.name.rsplit(".", 2)[0]

    @property
    def parameter(self) -> str:
        """The name of the parameter that W is, or one slice of."""
        leaf = "weight" if self.expert is None else self.name.rpartition(".")[2]
        return f"{self.module}.{leaf}"

    def stored(self, parameter: Tensor) -> Tensor:
        """Returns a view of W as it is stored, given the whole parameter."""
        return parameter if self.expert is None else parameter[self.expert]

    def view(self, parameter: Tensor) -> Tensor:
        """Returns a view of W, ``(m, n)``, given the whole parameter."""
        return self.stored(parameter).T if self.transposed else self.stored(parameter)

    @property
    def max_rank(self) -> int:
        """The largest rank a change of this target can have."""
        return min(self.out_features, self.in_features)


@dataclass(frozen=True, slots=True)
class _TensorKind:
    """Its shape, of m (``out_features``), n (``in_features``) and r (the rank), and its name in the PEFT layer."""

    axes: str
    parameter: str

    def numel(self, target: Target, rank: int) -> int:
        """Returns the number of its elements."""
        sizes = {"m": target.out_features, "n": target.in_features, "r": rank}
        return math.prod(sizes[axis] for axis in self.axes)


# The only list of them, in the order in which a trained model's state is read.
TRAINED_TENSORS: Mapping[TensorName, _TensorKind] = {
    "A": _TensorKind("rn", "lora_A.default.weight"),
    "B": _TensorKind("mr", "lora_B.default.weight"),
    "magnitude": _TensorKind("m", "lora_magnitude_vector.default.weight"),
    "bias": _TensorKind("m", "lora_B.default.bias"),
}
