"""What penalties have in common that are measured on the knowledge: how much of it, which labels, which covariances."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from keeptune.core.options import Options, Range
from keeptune.core.plan import TargetPlan
from keeptune.core.target import Target
from keeptune.linalg.symmetric import Identity, LowRankDiagonal, PsdMatrix, psd_matrix_from
from keeptune.penalties.base import Penalty, Site
from keeptune.penalties.kronecker import quadratic_form
from keeptune.statistics.fisher import TokenCount, tokens_per_learned
from keeptune.statistics.low_rank_covariance import (
    GRADIENT_RANK,
    INPUT_RANK,
    Covariance,
    FactorRank,
    chosen_rank,
    factor_bytes,
    gradient_request,
    input_request,
    read_factor,
)
from keeptune.statistics.request import DataRole, Labels, Request


@dataclass(frozen=True, kw_only=True)
class Draws(Options):
    """Options of what gradients are taken of.

    Args:
        labels: What gradients are taken of: ``"probe"`` and ``"sampled"`` are the Fisher, by random signs or by labels
            drawn from the model itself, which is noisier; ``"true"`` takes the data's tokens (the empirical Fisher).
        probes: How many draws of signs or labels are averaged, each a pass back over one pass forth.
        label_seed: Seed of the draws.
    """

    ranges = {"probes": Range(least=1)}

    labels: Labels = "probe"
    probes: int = 1
    label_seed: int = 0

    def __post_init__(self) -> None:
        """Checks the options, also against each other."""
        super().__post_init__()
        self.need(self.labels != "true" or self.probes == 1, "probes", "1 with `labels: true`, which are not drawn")


@dataclass(frozen=True, kw_only=True)
class FactorOptions(Draws):
    """Options of Ω = E[x xᵀ] of a target's inputs and Γ = E[δ δᵀ] of the gradients at its outputs.

    Args:
        rho: Damping of Γ towards the identity of its trace: 0 none, 1 leaves the trace only.
        factor_rank: How many directions of Ω and of Γ are kept beside their diagonal. ``"auto"`` keeps matrices of up
            to 1,024 wide whole, of wider ones 288 directions of Ω and 64 of Γ; None keeps all whole.
    """

    ranges = {"rho": Range(least=0, most=1), "factor_rank": Range(least=1)}

    rho: float = 0.0
    factor_rank: FactorRank = "auto"

    def __post_init__(self) -> None:
        """Checks the options."""
        super().__post_init__()
        known = self.factor_rank in ("auto", None) or isinstance(self.factor_rank, int)
        self.need(known, "factor_rank", 'a whole number of 1 or more, "auto", or None')


@dataclass(frozen=True, kw_only=True)
class MeasuredPenalty(Draws, Penalty):
    """A penalty that is measured on the knowledge.

    Args:
        batches: How many batches of each knowledge set are used; None is all of it.
        batch_size: Examples per batch; only ``batches`` depends on it.
    """

    ranges = dict.fromkeys(("batches", "batch_size"), Range(least=1))

    batches: int | None = None
    batch_size: int = 8

    @property
    def draws(self) -> dict[str, Any]:
        """The options of requests that say what is drawn, of which examples."""
        return {"seed": self.label_seed, "probes": self.probes, "examples": self.examples}

    @property
    def data(self) -> frozenset[DataRole]:
        """The knowledge."""
        return frozenset({"knowledge"})

    @property
    def examples(self) -> int | None:
        """How many examples of each knowledge set are used; None is all."""
        return None if self.batches is None else self.batches * self.batch_size

    @property
    def count(self) -> TokenCount:
        """The request for the number of tokens."""
        return TokenCount("knowledge", examples=self.examples)

    def tokens_per_learned(self, site: Site) -> float:
        """Returns the number of tokens for each one with a loss: with it a Fisher is that of one learned token."""
        return tokens_per_learned(site.stats, self.count)


@dataclass(frozen=True, kw_only=True)
class CovariancePenalty(FactorOptions, MeasuredPenalty):
    """A penalty ``w tr(Γ E Ω Eᵀ)`` on the change since the start (penalties/kronecker.py)."""

    @property
    def by_loss(self) -> bool:
        """Whether Γ is measured, for nats; else it is the identity."""
        raise NotImplementedError

    def inputs(self, target: Target) -> Covariance:
        """Returns the request for Ω."""
        rank = chosen_rank(self.factor_rank, target.in_features, INPUT_RANK)
        return input_request("knowledge", rank, examples=self.examples)

    def gradients(self, target: Target) -> Covariance:
        """Returns the request for Γ."""
        rank = chosen_rank(self.factor_rank, target.out_features, GRADIENT_RANK)
        return gradient_request("knowledge", self.labels, rank, **self.draws)

    def requests(self, target_plan: TargetPlan) -> frozenset[Request]:
        """Returns Ω, and for nats Γ and the number of tokens."""
        nats = {self.gradients(target_plan.target), self.count} if self.by_loss else set()
        return frozenset({self.inputs(target_plan.target), *nats})

    def size(self, target_plan: TargetPlan) -> Mapping[str, int]:
        """Returns that of Ω, which an input group shares, and of Γ, as training holds them."""
        target = target_plan.target
        sizes = {f"Omega:{target.input_group}:": factor_bytes(self.inputs(target), target.in_features)}
        if self.by_loss:
            sizes[f"Gamma:{target.name}:"] = factor_bytes(self.gradients(target), target.out_features)
        return sizes

    def measured(self, site: Site, rho_input: float = 0.0) -> dict[str, Tensor]:
        """Returns the tensors of Ω, per input group, and of Γ, damped by ``rho_input`` and ``rho``."""
        target = site.plan.target
        Omega = read_covariance(self.inputs(target), site).damped(rho_input)
        tensors = Omega.tensors(f"Omega:{target.input_group}:")
        if self.by_loss:
            tensors |= read_covariance(self.gradients(target), site).damped(self.rho).tensors(f"Gamma:{target.name}:")
        return tensors

    def factors(self, target: Target, tensors: Mapping[str, Tensor], one: Tensor) -> tuple[PsdMatrix, PsdMatrix]:
        """Returns Ω and Γ of what :meth:`measured` returned; an identity is a multiple of the scalar ``one``."""
        Omega = psd_matrix_from(tensors, f"Omega:{target.input_group}:")
        if self.by_loss:
            return Omega, psd_matrix_from(tensors, f"Gamma:{target.name}:")
        return Omega, Identity(target.out_features, one)

    def cost_of_weights(self, site: Site, tensors: Mapping[str, Tensor]) -> float:
        """Returns ``tr(Γ W Ω Wᵀ)``, what a change as large as W would cost, times the number of targets."""
        one = torch.ones((), dtype=torch.float64, device=site.weight.device)
        Omega, Gamma = (factor.to(torch.float64) for factor in self.factors(site.plan.target, tensors, one))
        return len(site.targets) * float(quadratic_form(site.weight.double(), Omega, Gamma))


def read_covariance(request: Covariance, site: Site) -> PsdMatrix:
    """Returns a covariance, float32 but for directions in bfloat16, on the device of the weight."""
    factor = read_factor(request, site.stats[request]).to(torch.float32, site.weight.device)
    return factor.halved() if isinstance(factor, LowRankDiagonal) else factor
