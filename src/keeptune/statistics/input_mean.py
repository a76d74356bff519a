"""The mean of a target's inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from keeptune.core.target import Target
from keeptune.statistics.request import RowRequest, WeightReader
from keeptune.statistics.running_mean import RunningMean


@dataclass(frozen=True, slots=True)
class InputMean(RowRequest):
    """``μ = E[h]``, ``(n,)``, of unmasked tokens; with ``Ω = E[h hᵀ]`` it gives the centred covariance ``Ω - μμᵀ``."""

    def numbers(self, target: Target) -> int:
        """Returns ``n``."""
        return target.in_features

    def accumulator(self, target: Target, device: torch.device, weight: WeightReader) -> RunningMean:
        """Returns a sum of inputs."""
        return RunningMean((target.in_features,), device, _add)


def _add(total: Tensor, h: Tensor) -> None:
    total += h.sum(dim=0, dtype=torch.float64)
