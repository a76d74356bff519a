"""Full fine-tuning, the reference that T (FARSS eq. 37) is relative to: every weight is trained.

There is no adapter: the result is a whole model, exported as ``merged``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from keeptune.core.plan import Decision, Scope, TargetPlan
from keeptune.core.target import Target
from keeptune.methods.strength import Strength
from keeptune.statistics.collect import StatsView
from keeptune.statistics.request import Request

__all__ = ["Full"]


@dataclass(frozen=True)
class Full:
    """Full fine-tuning; it has no options of its own."""

    name: ClassVar[str] = "full"
    paper: ClassVar[str] = "full fine-tuning, the usual reference"
    scope: ClassVar[Scope] = "all"
    strength_option: ClassVar[Strength | None] = None

    def requests(self, target: Target) -> frozenset[Request]:
        """Need nothing."""
        return frozenset()

    def score(self, target: Target, weight: Tensor, stats: StatsView) -> None:
        """Treat all targets alike."""

    def allocate(self, scores: Mapping[Target, None]) -> Mapping[Target, Decision]:
        """Give no target an adapter."""
        return {target: Decision(0) for target in scores}

    def build(self, target: Target, weight: Tensor, stats: StatsView, decision: Decision) -> TargetPlan:
        """Never called: no target has a rank."""
        raise NotImplementedError("full fine-tuning builds no adapter")

    def peft(self) -> Mapping[str, Any]:
        """Need nothing from PEFT."""
        return {}
