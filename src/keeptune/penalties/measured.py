"""What penalties have in common that are measured on the knowledge: how much of it, which labels, which covariances."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from keeptune.core.options import Range
from keeptune.core.target import Target
from keeptune.linalg.symmetric import LowRankDiagonal, PsdMatrix
from keeptune.penalties.base import Penalty, Site
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
from keeptune.statistics.request import DataRole, Labels


@dataclass(frozen=True, kw_only=True)
class MeasuredPenalty(Penalty):
    """A penalty that is measured on the knowledge.

    Args:
        labels: What gradients are taken of: ``"probe"`` and ``"sampled"`` are the Fisher, by random signs or by labels
            drawn from the model itself, which is noisier; ``"true"`` takes the data's tokens (the empirical Fisher).
        probes: How many draws of signs or labels are averaged, each a pass back over one pass forth.
        batches: How many batches of each knowledge set are used; None is all of it.
        batch_size: Examples per batch; only ``batches`` depends on it.
        label_seed: Seed of the draws.
    """

    ranges = dict.fromkeys(("batches", "batch_size", "probes"), Range(least=1))

    labels: Labels = "probe"
    probes: int = 1
    batches: int | None = None
    batch_size: int = 8
    label_seed: int = 0

    def __post_init__(self) -> None:
        """Checks the options, also against each other."""
        super().__post_init__()
        self.need(self.labels != "true" or self.probes == 1, "probes", "1 with `labels: true`, which are not drawn")

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
class CovariancePenalty(MeasuredPenalty):
    """A penalty by Ω = E[x xᵀ] of a target's inputs and Γ = E[δ δᵀ] of the gradients at its outputs.

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

    def inputs(self, target: Target) -> Covariance:
        """Returns the request for Ω."""
        rank = chosen_rank(self.factor_rank, target.in_features, INPUT_RANK)
        return input_request("knowledge", rank, examples=self.examples)

    def gradients(self, target: Target) -> Covariance:
        """Returns the request for Γ."""
        rank = chosen_rank(self.factor_rank, target.out_features, GRADIENT_RANK)
        return gradient_request("knowledge", self.labels, rank, **self.draws)

    @staticmethod
    def read(request: Covariance, site: Site) -> PsdMatrix:
        """Returns a covariance, float32 but for directions in bfloat16, on the device of the weight."""
        factor = read_factor(request, site.stats[request]).to(torch.float32, site.weight.device)
        return factor.halved() if isinstance(factor, LowRankDiagonal) else factor

    def factor_sizes(self, target: Target, *, inputs: bool, gradients: bool) -> dict[str, int]:
        """Returns the bytes of the matrices of Ω and of Γ as training holds them, by the start of their names."""
        sizes = {}
        if inputs:
            sizes[f"Omega:{target.input_group}:"] = factor_bytes(self.inputs(target), target.in_features)
        if gradients:
            sizes[f"Gamma:{target.name}:"] = factor_bytes(self.gradients(target), target.out_features)
        return sizes
