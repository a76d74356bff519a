"""KaSA: drop W's smallest singular components for good, and learn a change in the form of an SVD.

Wang et al., "KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models", ICLR 2025.

    W_world = W - U_r S_r V_rᵀ           without the r smallest singular components      (stage 1)
    y = W_world x + s B diag(d) A x      d ~ N(0, 1), A random, B = 0 at the start       (stage 2)
    L = L_task + beta L_2 + gamma L_3
    L_2 = sum d²                                                                         (9, 10)
    L_3 = ‖BᵀB - I‖ + ‖AAᵀ - I‖          as if B and Aᵀ held singular vectors             (11)

L_2 and L_3 are means over the targets. ``regularizer="gram"`` takes (11), the r x r form; ``"released"`` takes
the released code's ‖B Bᵀ - I_m‖ + ‖Aᵀ A - I_n‖, the n x n form, of which no rank-r A can reach zero: by
‖AᵀA - I_n‖² = ‖AAᵀ - I_r‖² + n - r it is the same term, damped. PEFT's ``_get_kasa_loss`` is (11), summed over
the targets. The released code drops nothing where m < n; here, as in PEFT, r of min(m, n) components go.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from keeptune.core.errors import PlanError
from keeptune.core.low_rank import LowRank
from keeptune.core.options import Range
from keeptune.core.plan import Decision, TargetPlan
from keeptune.core.target import Target
from keeptune.linalg.decompositions import end_triplets
from keeptune.methods.base import generator_for
from keeptune.methods.lora import LoraStart, draw_A
from keeptune.penalties.kasa_regularizers import KasaRegularizers, Regularizer
from keeptune.statistics.collect import StatsView


def dropped_part(W: Tensor, r: int, where: str) -> tuple[LowRank, Tensor]:
    """Returns W's r smallest singular components (stage 1), ``B = U_r diag(S_r)`` and ``A = V_rᵀ``, and S_r.

    Laws: ``W - B A`` is the nearest matrix of rank min(m, n) - r; ``A Aᵀ == I``; ``Bᵀ B == diag(S²)``.
    """
    U, S, Vh = end_triplets(W, r, "bottom", where)
    return LowRank(B=(U * S).float(), A=Vh.float()), S.float()


@dataclass(frozen=True)
class Kasa(LoraStart):
    """KaSA.

    Args:
        rank: r, at every target: as many components are dropped as are learned.
        seed: Seed of A and d; the recipe sets the training seed unless its method section has one.
        beta: Weight of the singular values' squares. FARSS: 1e-2 on Llama-2, 1e-4 on Llama-3.
        gamma: Weight of orthogonality. FARSS: 1e-4 on Llama-2, 1e-3 on Llama-3.
        regularizer: ``"gram"`` as in the paper and PEFT, ``"released"`` as in the released code.
    """

    name = "kasa"
    paper = "Wang et al., KaSA, ICLR 2025"
    anchored = True
    moves_start = True
    trains = frozenset({"A", "B", "diag"})
    ranges = {"beta": Range(least=0), "gamma": Range(least=0)}

    beta: float = 1e-4
    gamma: float = 1e-3
    regularizer: Regularizer = "gram"

    def allocate(self, scores: Mapping[Target, None]) -> Mapping[Target, Decision]:
        """Decides on the same rank for all targets; something of W must be left."""
        for target in scores:
            if self.rank == target.max_rank:
                raise PlanError(
                    f"method {self.name}, target {target.name}",
                    got=f"rank {self.rank}, which drops all of W",
                    wanted=f"1 to {target.max_rank - 1} for a {target.out_features} x {target.in_features} map",
                    next_step=f"Lower `method.rank`, or leave the role {target.role} out of `targets`.",
                )
        return super().allocate(scores)

    def build(self, target: Target, weight: Tensor, stats: StatsView, decision: Decision) -> TargetPlan:
        """Finds what W loses; draws A and d, sets B to zero."""
        r, generator = decision.rank, generator_for(target, self.seed)
        scale = self.scale_at(r)
        dropped, S = dropped_part(weight, r, target.name)
        return self.planned(
            target,
            decision,
            LowRank(B=torch.zeros(target.out_features, r), A=draw_A(r, target.in_features, generator)),
            scale,
            removed=dropped.scaled(1 / scale),
            vectors={"diag": torch.randn(r, generator=generator)},
            evidence={"dropped_values": S, "dropped_energy": (S**2).sum()[None] / weight.square().sum()},
        )

    def peft(self) -> Mapping[str, Any]:
        """Returns the options of KaSA, and the dropout."""
        return {"kasa_config": {"beta": self.beta, "gamma": self.gamma}, **super().peft()}

    def penalties(self) -> tuple[KasaRegularizers]:
        """Returns both regularisers."""
        return (KasaRegularizers.of(self),)
