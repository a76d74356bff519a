"""Laplace: hold the change where the model's loss on knowledge data is curved, or where its features would move.

After Sliwa, Schneider, Hennig, Hernandez-Lobato, "Mitigating Forgetting in Low Rank Adaptation" (LaLoRA, 2512.17720;
our reading, of which methods/lalora.py says what is not known), and beyond it.

    y = W x + s B A x,   δ = d loss / d y of the token losses' sum
    Ω = E[x xᵀ] (n, n),  Γ = E[δ δᵀ] (m, m)      over the tokens of the knowledge
    c = tokens / tokens learned                    so that the Fisher is that of one learned token

On the factors, around their start (A_0, B_0), with dA = A - A_0 and dB = B - B_0:

    diag        P = λ/2 sum (F_AA ∘ dA² + F_BB ∘ dB²)                                        (1)
    b-kfac      P = λ/2 c s² [tr(B_0ᵀΓB_0 dA Ω dAᵀ) + tr(Γ dB (A_0ΩA_0ᵀ) dBᵀ)]                 (2)
    b-tri-kfac  P = λ/2 c tr(Γ E Ω Eᵀ),  E = s (B_0 dA + dB A_0) = s L R,  L = [B_0, dB], R = [dA; A_0]  (3)
    dP/dA = λ c s² B_0ᵀΓB_0 dA Ω,   dP/dB = λ c s² Γ dB A_0ΩA_0ᵀ    of (2)
    dP/dA = λ c s² B_0ᵀΓL RΩ,       dP/dB = λ c s² ΓL RΩA_0ᵀ        of (3)

(3) is (2) and what couples A with B of one target; a Gram form of Γ ⊗ Ω, it is positive semi-definite.
On the weight change itself (penalties/kronecker.py), E = s (B A - B_0 A_0):

    delta-kfac  P = λ/2 c tr(Γ E Ω Eᵀ)                                                        (4)
    delta-act   P = λ mean_t tr(E Ω Eᵀ) / tr(W Ω Wᵀ)                                          (5)

Scale. (1) to (4) are the second order of the KL divergence from the base, in nats per token, if layers do not
interact: with λ = 1 a nat lost on the knowledge weighs as much as a nat of task loss. (5) is the mean relative feature
drift: what a change as large as W would cost is λ. (The penalty ``l2`` takes the mean relative change, without data.)

**At B_0 = 0, where LoRA starts, (1) to (3) cannot see A**: δ reaches A through B_0, so that F_AA = 0 and (3) is (2)
without its first term. A turns freely into what the knowledge uses, and only then does B move. (4) and (5) see B A.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from keeptune.core.low_rank import LowRank
from keeptune.core.options import Range
from keeptune.core.plan import Plan, TargetPlan
from keeptune.core.target import Target
from keeptune.linalg.symmetric import Identity, PsdMatrix
from keeptune.penalties.base import Form, Site, Term, on_factors, start_of
from keeptune.penalties.kronecker import kronecker_change
from keeptune.penalties.measured import MeasuredPenalty
from keeptune.statistics.covariance import (
    GradientCovariance,
    InputCovariance,
    LoraFisher,
    lora_fisher,
    split_diagonals,
    tokens_per_learned,
)
from keeptune.statistics.request import Request

Curvature = Literal["diag", "b-kfac", "b-tri-kfac", "delta-kfac", "delta-act"]
_TANGENT = ("diag", "b-kfac", "b-tri-kfac")


def diagonal(fisher: LowRank, weight: float | Tensor, start: LowRank) -> Form:
    """Returns ``w q``, q the sum in (1); the gradients are ``2 w F ∘ d``.

    Laws, for every form here: the value is that of the dense matrix; it is 0, and so is its gradient, at the start.

    Args:
        fisher: ``F_BB`` in the place of B, ``F_AA`` in that of A; not negative.
        weight: w, a number or a scalar tensor.
        start: ``B_0`` and ``A_0``, in the dtype of the factors.
    """

    def form(delta: LowRank) -> tuple[Tensor, LowRank]:
        dB, dA = delta.B - start.B, delta.A - start.A
        to_B, to_A = fisher.B * dB, fisher.A * dA
        value = weight * ((to_B * dB).sum() + (to_A * dA).sum())
        return value, LowRank(B=2 * weight * to_B, A=2 * weight * to_A)

    return form


def block_kronecker(
    Omega: PsdMatrix, Gamma: PsdMatrix, *, scale: float, weight: float | Tensor, start: LowRank
) -> Form:
    """Returns ``w q`` of (2) and its gradient, with what does not change in training formed once."""
    P, Q = start.B.T @ (Gamma @ start.B), start.A @ (Omega @ start.A.T)
    Omega, w = _seen(Omega, start), weight * scale**2

    def form(delta: LowRank) -> tuple[Tensor, LowRank]:
        dB, dA = delta.B - start.B, delta.A - start.A
        to_B, to_A = Gamma @ dB @ Q, P @ (Omega @ dA.T).T
        return w * ((to_B * dB).sum() + (to_A * dA).sum()), LowRank(B=2 * w * to_B, A=2 * w * to_A)

    return form


def coupled_kronecker(
    Omega: PsdMatrix, Gamma: PsdMatrix, *, scale: float, weight: float | Tensor, start: LowRank
) -> Form:
    """Returns ``w q`` of (3) and its gradient, with what does not change in training formed once."""
    B_0, A_0 = start.B, start.A
    GB, AO = Gamma @ B_0, (Omega @ A_0.T).T
    Omega, w = _seen(Omega, start), weight * scale**2

    def form(delta: LowRank) -> tuple[Tensor, LowRank]:
        dB, dA, r = delta.B - B_0, delta.A - A_0, delta.rank
        L, GL = torch.cat([B_0, dB], dim=1), torch.cat([GB, Gamma @ dB], dim=1)
        R, RO = torch.cat([dA, A_0]), torch.cat([(Omega @ dA.T).T, AO])
        LGL, RORt = L.T @ GL, RO @ R.T
        # The first r rows of LᵀΓL are B_0ᵀΓL; the last r columns of RΩRᵀ are RΩA_0ᵀ.
        return w * (LGL * RORt).sum(), LowRank(B=2 * w * (GL @ RORt[:, r:]), A=2 * w * (LGL[:r] @ RO))

    return form


def _seen(Omega: PsdMatrix, start: LowRank) -> PsdMatrix:
    """Leaves ``dA Ω`` out where nothing is multiplied with it but zeros: at B_0 = 0."""
    return Omega if bool(start.B.any()) else Identity(start.shape[1], start.A.new_zeros(()))


@dataclass(frozen=True)
class Laplace(MeasuredPenalty):
    """A quadratic penalty by the curvature of the loss on knowledge data.

    Args:
        strength: λ.
        curvature: Which form, (1) to (5).
    """

    name = "laplace"
    paper = "Sliwa et al., LaLoRA, 2512.17720 (our reading)"
    ranges = {"strength": Range(least=0)}

    strength: float = 100.0
    curvature: Curvature = "delta-act"

    @property
    def by_loss(self) -> bool:
        """Whether the form is a Fisher."""
        return self.curvature != "delta-act"

    @property
    def inputs(self) -> InputCovariance:
        """The request for Ω."""
        return InputCovariance("knowledge", examples=self.examples)

    @property
    def gradients(self) -> GradientCovariance:
        """The request for Γ."""
        return GradientCovariance("knowledge", self.labels, **self.draws)

    def requests(self, target_plan: TargetPlan) -> frozenset[Request]:
        """Returns the covariances that the form is made of, or the diagonals at the start."""
        if self.curvature == "diag":
            return frozenset({self.count, self._diagonals(target_plan)})
        return frozenset({self.inputs, self.gradients, self.count} if self.by_loss else {self.inputs})

    def tensors(self, site: Site) -> Mapping[str, Tensor]:
        """Returns Ω per input group, Γ or the diagonals per target, and what the form is multiplied by."""
        target, device = site.plan.target, site.weight.device
        if self.curvature == "diag":
            tensors = {f"diagonals:{target.name}": site.stats[self._diagonals(site.plan)]}
        else:
            tensors = {_omega(target): site.stats[self.inputs].to(device)}
        if self.curvature not in ("diag", "delta-act"):
            tensors[_gamma(target)] = site.stats[self.gradients].to(device)
        if self.by_loss:
            weight = self.strength / 2 * tokens_per_learned(site.stats, self.count)
        else:
            W = site.weight.double()
            cost = len(site.targets) * float((W * (tensors[_omega(target)].double() @ W.T).T).sum())
            weight = self.strength / cost if cost > 0 else 0.0
        return tensors | {f"weight:{target.name}": torch.tensor(weight)}

    def size(self, target_plan: TargetPlan) -> Mapping[str, int]:
        """Returns that of Ω, which an input group shares, and of Γ, or that of the diagonals."""
        target, rank = target_plan.target, target_plan.decision.rank
        if self.curvature == "diag":
            return {f"diagonals:{target.name}": 4 * rank * (target.out_features + target.in_features)}
        gamma = {_gamma(target): 4 * target.out_features**2} if self.by_loss else {}
        return {_omega(target): 4 * target.in_features**2} | gamma

    def bind(self, target_plan: TargetPlan, tensors: Mapping[str, Tensor]) -> Term:
        """Returns the form of one target."""
        target, scale = target_plan.target, target_plan.scale
        weight = tensors[f"weight:{target.name}"]
        first = target_plan.init.to(torch.float32, weight.device)
        if self.curvature == "diag":
            fisher = split_diagonals(tensors[f"diagonals:{target.name}"], target.out_features)
            return on_factors(diagonal(fisher, weight, first))
        Omega = tensors[_omega(target)]
        Gamma = tensors[_gamma(target)] if self.by_loss else Identity(target.out_features, torch.ones_like(weight))
        if self.curvature in _TANGENT:
            form = block_kronecker if self.curvature == "b-kfac" else coupled_kronecker
            return on_factors(form(Omega, Gamma, scale=scale, weight=weight, start=first))
        return on_factors(kronecker_change(Omega, Gamma, scale, weight, start_of(target_plan, weight.device)))

    def notes(self, plan: Plan, tensors: Mapping[str, Tensor]) -> list[str]:
        """Returns what the form cannot see from where the plan starts."""
        if self.curvature not in _TANGENT:
            return []
        blind = [t for t in plan.targets if not bool(t.init.B.any()) and "A" in t.trainable]
        if not blind:
            return []
        whole = "all" if len(blind) == len(plan.targets) else f"{len(blind)} of {len(plan.targets)}"
        return [
            f"penalty laplace, {self.curvature}: B is zero at the start of {whole} targets, where the Fisher of A is "
            "zero: A moves free of cost. delta-kfac and delta-act hold the weight change itself."
        ]

    def _diagonals(self, target_plan: TargetPlan) -> LoraFisher:
        return lora_fisher("knowledge", self.labels, target_plan.init, target_plan.scale, **self.draws)


def _omega(target: Target) -> str:
    return f"Omega:{target.input_group}:matrix"


def _gamma(target: Target) -> str:
    return f"Gamma:{target.name}:matrix"
