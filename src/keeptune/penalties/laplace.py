"""Laplace: hold the change where the model's loss on knowledge data is curved, or where its features would move.

After Sliwa, Schneider, Hennig, Hernandez-Lobato, "Mitigating Forgetting in Low Rank Adaptation" (LaLoRA, 2512.17720;
our reading, of which methods/lalora.py says what is not known), and beyond it.

    y = W x + s B A x,   δ = d loss / d y of the token losses' sum
    Ω = E[x xᵀ] (n, n),  Γ = E[δ δᵀ] (m, m)      over the tokens of the knowledge
    c = tokens / tokens learned                    so that the Fisher is that of one learned token

On the factors, around their start (A_0, B_0), with dA = A - A_0 and dB = B - B_0 (penalties/tangent.py):

    diag        P = λ/2 sum (F_AA ∘ dA² + F_BB ∘ dB²)                                        (1)
    b-kfac      P = λ/2 c s² [tr(B_0ᵀΓB_0 dA Ω dAᵀ) + tr(Γ dB (A_0ΩA_0ᵀ) dBᵀ)]                 (2)
    b-tri-kfac  P = λ/2 c tr(Γ E Ω Eᵀ),  E = s (B_0 dA + dB A_0)                              (3)

On the weight change itself (penalties/kronecker.py), E = s (B A - B_0 A_0):

    delta-kfac  P = λ/2 c tr(Γ E Ω Eᵀ)                                                        (4)
    delta-act   P = λ mean_t tr(E Ω Eᵀ) / tr(W Ω Wᵀ)                                          (5)
    l2          P = λ mean_t ‖E‖² / ‖W‖²                                                      (6)

Scale. (1) to (4) are the second order of the KL divergence from the base, in nats per token, if layers do not
interact: with λ = 1 a nat lost on the knowledge weighs as much as a nat of task loss. (5) is the mean relative feature
drift, (6) the mean relative change: what a change as large as W would cost is λ.

**At B_0 = 0, where LoRA starts, (1) to (3) cannot see A**: δ reaches A through B_0, so that F_AA = 0 and (3) is (2)
without its first term. A turns freely into what the knowledge uses, and only then does B move. (4) to (6) see B A.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from keeptune.core.errors import PlanError
from keeptune.core.plan import Plan, TargetPlan
from keeptune.linalg.symmetric import Identity, LowRankPlus, PsdMatrix, psd_matrix_from
from keeptune.penalties.base import OnChange, OnFactors, Site, Term, start_of
from keeptune.penalties.kronecker import KroneckerChange, quadratic_form
from keeptune.penalties.option_checks import check_counts, check_strength
from keeptune.penalties.tangent import Diagonal, block_kronecker, coupled_kronecker
from keeptune.statistics.fisher import LoraFisher, TokenCount, lora_fisher, split_diagonals, tokens_per_learned
from keeptune.statistics.low_rank_covariance import Covariance, gradient_request, input_request, read_factor, unpacked
from keeptune.statistics.request import DataRole, Labels, Request

__all__ = ["Curvature", "Laplace"]

Curvature = Literal["diag", "b-kfac", "b-tri-kfac", "delta-kfac", "delta-act", "l2"]
_TANGENT = ("diag", "b-kfac", "b-tri-kfac")
_OMEGA = ("b-kfac", "b-tri-kfac", "delta-kfac", "delta-act")
_GAMMA = ("b-kfac", "b-tri-kfac", "delta-kfac")
_FISHER = ("diag", *_GAMMA)


@dataclass(frozen=True)
class Laplace:
    """A quadratic penalty by the curvature of the loss on knowledge data.

    Args:
        strength: λ.
        curvature: Which form, (1) to (6).
        labels: ``"sampled"`` draws what the model itself would say (the Fisher), ``"true"`` takes the data's tokens
            (the empirical Fisher).
        batches: How many batches of each knowledge set are used; None is all of it.
        batch_size: Examples per batch; it only says how much ``batches`` is.
        rho: Damping of Γ towards the identity of its trace: 0 none, 1 leaves the trace only.
        rho_input: The same of Ω.
        factor_rank: Keep this many directions of Ω and Γ, and one number for the others; None keeps all.
        label_seed: Seed of sampled labels.

    Raises:
        PlanError: An option is out of range.
    """

    name: ClassVar[str] = "laplace"
    paper: ClassVar[str] = "Sliwa et al., LaLoRA, 2512.17720 (our reading)"

    strength: float = 100.0
    curvature: Curvature = "delta-act"
    labels: Labels = "sampled"
    batches: int | None = None
    batch_size: int = 8
    rho: float = 0.0
    rho_input: float = 0.0
    factor_rank: int | None = None
    label_seed: int = 0

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            PlanError: One is out of range.
        """
        check_strength(self.strength, self.name)
        for key, value in (("rho", self.rho), ("rho_input", self.rho_input)):
            if not 0 <= value <= 1:
                raise PlanError(
                    f"penalty laplace, {key}", got=str(value), wanted="0 to 1", next_step="Correct the value."
                )
        check_counts(self.name, batches=self.batches, batch_size=self.batch_size, factor_rank=self.factor_rank)

    @property
    def data(self) -> frozenset[DataRole]:
        """Need knowledge, but for the plain size of the change."""
        return frozenset() if self.curvature == "l2" else frozenset({"knowledge"})

    @property
    def examples(self) -> int | None:
        """How many examples of each knowledge set are used."""
        return None if self.batches is None else self.batches * self.batch_size

    def requests(self, target_plan: TargetPlan) -> frozenset[Request]:
        """Need the covariances that the form is made of, or the diagonals at the start.

        Raises:
            PlanError: The form holds A and B, and there are singular values between them.
        """
        found: set[Request] = set()
        if self.curvature in _TANGENT and "diag" in target_plan.vectors:
            raise PlanError(
                f"penalty laplace, {self.curvature}",
                got="a method that trains singular values between A and B",
                wanted="plain factors, whose Fisher it is",
                next_step="Take delta-kfac, delta-act or l2, which hold the weight change.",
            )
        if self.curvature in _OMEGA:
            found.add(self._inputs())
        if self.curvature in _GAMMA:
            found |= {self._gradients(), self._count()}
        if self.curvature == "diag":
            found |= {self._diagonals(target_plan), self._count()}
        return frozenset(found)

    def tensors(self, site: Site) -> Mapping[str, Tensor]:
        """Keep Ω per input group, Γ or the diagonals per target, and what the form is multiplied by."""
        target, found = site.plan.target, dict[str, Tensor]()
        Omega, Gamma = self._factors(site)
        if self.curvature in _OMEGA:
            found |= Omega.tensors(f"Omega:{target.input_group}:")
        if self.curvature in _GAMMA:
            found |= Gamma.tensors(f"Gamma:{target.name}:")
        if self.curvature == "diag":
            found[f"diagonals:{target.name}"] = site.stats[self._diagonals(site.plan)]
        found |= self._errors(site)
        if self.curvature in _FISHER:
            weight = self.strength / 2 * tokens_per_learned(site.stats, self._count())
        else:
            cost = float(quadratic_form(site.weight.double(), Omega.to(torch.float64), Gamma.to(torch.float64)))
            weight = self.strength / (len(site.targets) * cost) if cost > 0 else 0.0
        return found | {f"weight:{target.name}": torch.tensor(weight)}

    def bind(self, target_plan: TargetPlan, tensors: Mapping[str, Tensor]) -> Term:
        """Make the form of one target."""
        target, scale = target_plan.target, target_plan.scale
        weight = tensors[f"weight:{target.name}"]
        first = target_plan.init.to(torch.float32, weight.device)
        if self.curvature == "diag":
            fisher = split_diagonals(tensors[f"diagonals:{target.name}"], target.out_features)
            return OnFactors(Diagonal(fisher, weight, first))
        one = torch.ones_like(weight)
        Omega: PsdMatrix = Identity(target.in_features, one)
        Gamma: PsdMatrix = Identity(target.out_features, one)
        if self.curvature in _OMEGA:
            Omega = psd_matrix_from(tensors, f"Omega:{target.input_group}:")
        if self.curvature in _GAMMA:
            Gamma = psd_matrix_from(tensors, f"Gamma:{target.name}:")
        if self.curvature == "b-kfac":
            return OnFactors(block_kronecker(Omega, Gamma, scale=scale, weight=weight, start=first))
        if self.curvature == "b-tri-kfac":
            return OnFactors(coupled_kronecker(Omega, Gamma, scale=scale, weight=weight, start=first))
        return OnChange(KroneckerChange(Omega, Gamma, scale, weight, start_of(target_plan, weight.device)))

    def notes(self, plan: Plan, tensors: Mapping[str, Tensor]) -> list[str]:
        """Say what the form cannot see from where the plan starts, and what factors of low rank leave out."""
        return [*self._blindness(plan), *self._remainders(tensors)]

    def _blindness(self, plan: Plan) -> list[str]:
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

    def _remainders(self, tensors: Mapping[str, Tensor]) -> list[str]:
        said = []
        for factor in ("Omega", "Gamma"):
            errors = {
                k.removeprefix("error:"): float(v) for k, v in tensors.items() if k.startswith(f"error:{factor}:")
            }
            if not errors:
                continue
            kept = []
            for name in errors:
                made = psd_matrix_from(tensors, f"{name}:")
                kept.append(float(made.share()) if isinstance(made, LowRankPlus) else 1.0)
            worst = max(errors, key=lambda name: errors[name])
            said.append(
                f"penalty laplace, {factor} in {self.factor_rank} directions and a scalar: {min(kept):.1%} to "
                f"{max(kept):.1%} of the trace in the directions, relative error at most {errors[worst]:.2g} "
                f"({worst.partition(':')[2]})"
            )
        return said

    def _errors(self, site: Site) -> dict[str, Tensor]:
        """Keep what factors of low rank miss, relative, in Frobenius' norm."""
        if self.factor_rank is None:
            return {}
        target, found = site.plan.target, dict[str, Tensor]()
        if self.curvature in _OMEGA:
            found[f"error:Omega:{target.input_group}"] = torch.tensor(unpacked(site.stats[self._inputs()]).error)
        if self.curvature in _GAMMA:
            found[f"error:Gamma:{target.name}"] = torch.tensor(unpacked(site.stats[self._gradients()]).error)
        return found

    def _inputs(self) -> Covariance:
        return input_request("knowledge", self.factor_rank, examples=self.examples)

    def _gradients(self) -> Covariance:
        return gradient_request(
            "knowledge", self.labels, self.factor_rank, seed=self.label_seed, examples=self.examples
        )

    def _count(self) -> TokenCount:
        return TokenCount("knowledge", self.examples)

    def _diagonals(self, target_plan: TargetPlan) -> LoraFisher:
        return lora_fisher(
            "knowledge",
            self.labels,
            target_plan.init,
            target_plan.scale,
            seed=self.label_seed,
            examples=self.examples,
        )

    def _factors(self, site: Site) -> tuple[PsdMatrix, PsdMatrix]:
        target, device = site.plan.target, site.weight.device
        one = torch.ones((), device=device)
        Omega: PsdMatrix = Identity(target.in_features, one)
        Gamma: PsdMatrix = Identity(target.out_features, one)
        if self.curvature in _OMEGA:
            inputs = self._inputs()
            Omega = read_factor(inputs, site.stats[inputs]).to(torch.float32, device).damped(self.rho_input)
        if self.curvature in _GAMMA:
            gradients = self._gradients()
            Gamma = read_factor(gradients, site.stats[gradients]).to(torch.float32, device).damped(self.rho)
        return Omega, Gamma
