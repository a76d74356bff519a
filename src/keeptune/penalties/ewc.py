"""EWC: hold each weight by how much the loss on knowledge data depends on it.

Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks" (1612.00796), for low-rank changes as in
EWC-LoRA (2602.17559): the Fisher is that of the whole weight, not of A and B.

    P = λ/2 sum F ∘ E²,   E = s (B A - B_0 A_0)                                   (1)
    F = (1/T) sum_texts g ∘ g,   g the gradient of a text's loss in W             (2)
    dP/dB = λ s (F ∘ E) Aᵀ,   dP/dA = λ s Bᵀ (F ∘ E)                              (3)

With T the number of learned tokens, (1) is in nats per token, as the other forms of the Fisher are (laplace). F is
m x n and stays in memory: as much as the weight. (1) and (3) go through it some rows at a time, so that no other m x n
matrix is formed. EWC-LoRA's F is no smaller: the gradient in B A is that in W, and its code keeps m x n numbers of each
target (k and v of a ViT). With s = 1, B_0 = 0, one text a batch and a label each, its code computes this P to the last
digits (``labels: true``). Departures: it squares the mean gradient of a batch, in which texts cancel each other,
times the batch size; takes F once a task is learned, not at the base, and sums tasks, F <- γ F + F_new; and adds the A
and the B of a learned task up apart, (A + A')(B + B'), which is not the change that (1) held.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from keeptune.core.low_rank import LowRank
from keeptune.core.options import Range
from keeptune.core.plan import TargetPlan
from keeptune.penalties.base import Form, Site, Term, on_factors, start_of
from keeptune.penalties.kronecker import change_since
from keeptune.penalties.measured import MeasuredPenalty
from keeptune.statistics.covariance import Per, WeightFisher, tokens_per_learned
from keeptune.statistics.request import Request

_NUMBERS = 1 << 20  # in a temporary


def diagonal_change(
    fisher: Tensor, scale: float, weight: float | Tensor, start: LowRank | None = None, numbers: int = _NUMBERS
) -> Form:
    """Returns ``w sum F ∘ E²`` of the change since the start (1, 3).

    Laws: the value is that of the dense E; it does not depend on the chunks; ``(G A, B G⁻¹)`` has the value of
    ``(A, B)``; it is 0, and so is its gradient, at the start.

    Args:
        fisher: F, ``(m, n)``, of any floating dtype; not negative.
        scale: s.
        weight: w, a number or a scalar tensor.
        start: ``B_0`` and ``A_0``; None where ``B_0 A_0 = 0``.
        numbers: How many numbers a temporary may hold.
    """

    def chunks(L: Tensor, R: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Goes through F by rows: which, ``F ∘ E`` and ``E``."""
        step = max(numbers // R.shape[1], 1)
        for first in range(0, L.shape[0], step):
            rows = slice(first, first + step)
            E = scale * (L[rows] @ R)
            yield rows, fisher[rows].to(E.dtype) * E, E

    def form(delta: LowRank) -> tuple[Tensor, LowRank]:
        L, R = change_since(delta, start)
        values, to_B, to_A = [], [], torch.zeros_like(delta.A)
        for rows, FE, E in chunks(L, R):
            values.append((FE * E).sum())
            to_B.append(FE @ delta.A.T)
            to_A = to_A + delta.B[rows].T @ FE
        w = 2 * weight * scale
        return weight * torch.stack(values).sum(), LowRank(B=w * torch.cat(to_B), A=w * to_A)

    return form


@dataclass(frozen=True)
class Ewc(MeasuredPenalty):
    """The diagonal Fisher of the weights, on the weight change.

    Args:
        strength: λ; at 1 a nat lost on the knowledge costs a nat of task loss, to second order.
        per: ``"text"`` squares the gradient of each text (2), ``"token"`` that of each token.
    """

    name = "ewc"
    paper = "Kirkpatrick et al., EWC, 1612.00796; EWC-LoRA, 2602.17559"
    ranges = {"strength": Range(least=0)}

    strength: float = 1.0
    per: Per = "text"

    @property
    def _fisher(self) -> WeightFisher:
        return WeightFisher("knowledge", self.labels, per=self.per, **self.draws)

    def requests(self, target_plan: TargetPlan) -> frozenset[Request]:
        """Returns the diagonal Fisher, and what makes it one per learned token."""
        return frozenset({self._fisher, self.count})

    def tensors(self, site: Site) -> Mapping[str, Tensor]:
        """Returns F over T/N, and ``λ/2 N/T``."""
        name = site.plan.target.name
        return {
            f"F:{name}": site.stats[self._fisher],
            f"weight:{name}": torch.tensor(self.strength / 2 * tokens_per_learned(site.stats, self.count)),
        }

    def size(self, target_plan: TargetPlan) -> Mapping[str, int]:
        """Returns that of F."""
        target = target_plan.target
        return {f"F:{target.name}": 4 * target.out_features * target.in_features}

    def bind(self, target_plan: TargetPlan, tensors: Mapping[str, Tensor]) -> Term:
        """Returns (1) of one target."""
        name = target_plan.target.name
        weight = tensors[f"weight:{name}"]
        start = start_of(target_plan, weight.device)
        return on_factors(diagonal_change(tensors[f"F:{name}"], target_plan.scale, weight, start))
