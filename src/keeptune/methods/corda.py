"""CorDA: choose the directions of W by what they do to the inputs, not by their size in W alone.

Yang et al., "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models for Task-Aware
Parameter-Efficient Fine-tuning", NeurIPS 2024.

    C = E[x xᵀ]                                   inputs on chosen data             (1)
    W C = U S Vᵀ                                                                    (2)
    W = Σ_i u_i s_i (v_iᵀ C⁻¹)                                                      (3)
    B = U_r sqrt(S_r),  A = sqrt(S_r) V_rᵀ C⁻¹                                      (4)
    W' = W - B A                                  frozen                            (5)

``kpm`` (knowledge-preserved mode) takes the last r with C from knowledge: what they write is smallest there.
``ipm`` (instruction-previewed mode) takes the first r with C from the task.

No inverse is needed: V_rᵀ C⁻¹ = S_r⁻¹ U_rᵀ W, so that B A = U_r U_rᵀ W, whatever C's condition. (2) is done in
float64: in float32 the last r of a falling spectrum are rounding noise.

The paper adds to C's diagonal 0.01 of its mean, and doubles that until C can be inverted; ``damping`` is that share,
never doubled. C is divided by its mean variance first: B A does not depend on C's size, but the paper's balance of B
and A does, and so would change with the units of the inputs. Where s_i is below 1e-4 of what W holds along u_i
(possible without damping only), 1e-4 stands in for it in (4): A stays bounded and B A the same.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from keeptune.core.low_rank import LowRank
from keeptune.core.options import Range
from keeptune.core.plan import Decision, TargetPlan
from keeptune.core.target import Target
from keeptune.linalg.decompositions import end_triplets
from keeptune.methods.base import ScaledMethod
from keeptune.statistics.collect import StatsView
from keeptune.statistics.covariance import InputCovariance
from keeptune.statistics.request import DataRole, Request

_LEAST_GAIN = 1e-4
_PAPERS_DAMPING = 0.01


def conditioned(C: Tensor, damping: float) -> Tensor:
    """Divides C ``(n, n)`` by its mean variance and adds ``damping`` to its diagonal; float64.

    Law: ``conditioned(c C, d) == conditioned(C, d)`` for c > 0; the identity for inputs that are all zero.
    """
    C = C.to(torch.float64, copy=True)
    if not C.any():
        return torch.eye(len(C), dtype=torch.float64, device=C.device)
    C /= C.diagonal().mean()
    C.diagonal().add_(damping)
    return C


def oriented_factors(W: Tensor, C: Tensor, r: int, end: Literal["top", "bottom"], where: str) -> tuple[LowRank, Tensor]:
    """Splits the part of W that writes into r left singular vectors of ``W C`` (2-4); returns it and S ``(r,)``.

    Laws: ``B A == U_r U_rᵀ W``; ``B == U_r sqrt(S_r)``; for C = I the balanced triplets of W.

    Args:
        W: ``(m, n)``.
        C: ``(n, n)``, float64.
        r: How many.
        end: The largest or the smallest.
        where: The module's name, for error messages.
    """
    W = W.double()
    U, S, _ = end_triplets(W @ C, r, end, where)
    part = U.T @ W
    root = torch.maximum(S, _LEAST_GAIN * part.norm(dim=1)).sqrt()
    return LowRank(B=(U * root).float(), A=(part / root.clamp_min(1e-150)[:, None]).float()), S


@dataclass(frozen=True)
class Corda(ScaledMethod):
    """CorDA.

    Args:
        mode: ``"kpm"`` keeps knowledge and needs knowledge data; ``"ipm"`` learns fast and needs task data.
        damping: Added to C's diagonal, as a share of its mean; 0.01 in the paper.
    """

    name = "corda"
    paper = "Yang et al., CorDA, NeurIPS 2024"
    anchored = True
    ranges = {"damping": Range(least=0)}

    mode: Literal["kpm", "ipm"] = "kpm"
    damping: float = _PAPERS_DAMPING

    @property
    def _request(self) -> Request:
        # Damping hides what float32 rounds away at the bottom; without it, that is what kpm takes.
        exact = self.mode == "kpm" and self.damping < _PAPERS_DAMPING
        role: DataRole = "knowledge" if self.mode == "kpm" else "task"
        return InputCovariance(role, precision="double" if exact else "single")

    @property
    def statistics(self) -> frozenset[Request]:
        """The input covariance on knowledge (kpm) or on the task (ipm)."""
        return frozenset({self._request})

    def build(self, target: Target, weight: Tensor, stats: StatsView, decision: Decision) -> TargetPlan:
        """Decomposes W C and splits W along its left singular vectors (1-4)."""
        C = stats.derive(self._request, conditioned, self.damping).to(weight.device)
        end: Literal["top", "bottom"] = "bottom" if self.mode == "kpm" else "top"
        init, S = oriented_factors(weight, C, decision.rank, end, target.name)
        scale = self.scale_at(decision.rank)
        start = LowRank(B=init.B / scale**0.5, A=init.A / scale**0.5)
        return self.planned(target, decision, start, scale, evidence={"oriented_singular_values": S.float()})
