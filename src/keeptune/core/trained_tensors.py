"""The tensors that a method can train at a target: shape, and parameter of the PEFT layer; the only list of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from keeptune.core.target import Target

__all__ = ["TRAINED_TENSORS", "TensorKind", "TensorName"]

TensorName = str


@dataclass(frozen=True, slots=True)
class TensorKind:
    """A kind of trained tensor.

    Args:
        axes: Its shape, of m (``out_features``), n (``in_features``) and r (the rank).
        parameter: Its name in the PEFT layer, for the adapter ``"default"``.
    """

    axes: str
    parameter: str

    def numel(self, target: Target, rank: int) -> int:
        """Returns the number of its elements."""
        sizes = {"m": target.out_features, "n": target.in_features, "r": rank}
        return math.prod(sizes[axis] for axis in self.axes)


# In the order in which a trained model's state is read.
TRAINED_TENSORS: Mapping[TensorName, TensorKind] = {
    "A": TensorKind("rn", "lora_A.default.weight"),
    "B": TensorKind("mr", "lora_B.default.weight"),
    "magnitude": TensorKind("m", "lora_magnitude_vector.default.weight"),
    "diag": TensorKind("r", "lora_diag.default"),
    "bias": TensorKind("m", "lora_B.default.bias"),
    "U_low": TensorKind("mr", "osf_svd_params.default.U_low"),
    "S_low": TensorKind("r", "osf_svd_params.default.S_low"),
    "V_low": TensorKind("rn", "osf_svd_params.default.V_low"),
}
