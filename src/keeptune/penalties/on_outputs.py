"""What a penalty on the model's answers declares; the engine (training/output_passes.py) runs the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from keeptune.data.calibration import Calibration
from keeptune.statistics.request import DataRole

__all__ = ["OfOutputs", "TextBatch"]


@dataclass(frozen=True, slots=True, eq=False)
class TextBatch:
    """Texts that the model is run on in a step.

    Args:
        number: Equal numbers are equal batches, throughout a training.
        input_ids: ``(texts, length)``.
        attention_mask: 1 for a token, 0 for padding.
        learned: True for a token that is predicted, which the first of a text never is.
    """

    number: int
    input_ids: Tensor
    attention_mask: Tensor
    learned: Tensor


@runtime_checkable
class OfOutputs(Protocol):
    """A penalty on how far the model's answers are from the base's: (1) of penalties/kl.py, on batches of its own.

    The engine runs the model (training/output_passes.py); the gradient is autograd's.
    """

    strength: float
    kept_mib: int

    def texts(self, data: Mapping[DataRole, Calibration]) -> Mapping[str, Tensor]:
        """Make the tensors of the texts, saved with the plan.

        Args:
            data: Tokens per data role.

        Returns:
            Name to tensor.
        """
        ...

    def batch(self, tensors: Mapping[str, Tensor]) -> TextBatch:
        """Take the texts of the next step.

        Args:
            tensors: The penalty's own.

        Returns:
            The batch.
        """
        ...
