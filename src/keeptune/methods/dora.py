"""DoRA: train the direction of each row of W by a low-rank change, and its length by a number of its own.

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation", ICML 2024.

    W' = m ∘ V / ‖V‖,   V = W + s B A                                     (5, 6)
    m = ‖W‖ at the start, with B = 0: W' = W
    ‖V‖ is held constant in the backward pass                             (section 4.3)

‖·‖ are the Euclidean lengths of the rows of W (out x in), one per output. The paper writes W the other way
round and says columns. The forward pass is PEFT's, which forms V (m x n) in every step.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from keeptune.core.errors import PlanError
from keeptune.core.plan import Decision, TargetPlan
from keeptune.core.target import Target
from keeptune.methods.lora import Lora, draw_start
from keeptune.statistics.collect import StatsView


@dataclass(frozen=True)
class Dora(Lora):
    """DoRA.

    Args:
        dropout: Dropout before A and before W's share of eq. 5, during training.
    """

    name = "dora"
    paper = "Liu et al., DoRA, ICML 2024"
    trains = frozenset({"A", "B", "magnitude"})

    def build(self, target: Target, weight: Tensor, stats: StatsView, decision: Decision) -> TargetPlan:
        """Draws A, sets B to zero and measures the rows of W (eq. 5)."""
        r, m = decision.rank, torch.linalg.vector_norm(weight, dim=1)
        zeros = int((m == 0).sum())
        if zeros:
            # (5) would divide zero by zero, and PEFT's forward pass would return NaN.
            raise PlanError(
                f"method {self.name}, target {target.name}",
                got=f"{zeros} rows of zeros in its weight, which have no direction",
                wanted="none",
                next_step=f"Leave the role {target.role} out of `targets`, or use `lora`.",
            )
        start = draw_start(target, r, self.seed)
        return self.planned(target, decision, start, self.scale_at(r), vectors={"magnitude": m})

    def peft(self) -> Mapping[str, Any]:
        """Returns the flag of DoRA, and the dropout."""
        return {"use_dora": True, **super().peft()}
