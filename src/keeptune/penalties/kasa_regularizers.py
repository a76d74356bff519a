"""KaSA's two regularisers (methods/kasa.py), the means over the targets.

beta L_2 + gamma L_3
L_2 = sum d²                                    (9, 10)
L_3 = ‖BᵀB - I‖ + ‖AAᵀ - I‖                     (11)
d L_3 / dB = 2 B (BᵀB - I) / ‖BᵀB - I‖, and alike for A
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from keeptune.core.errors import PlanError
from keeptune.core.plan import TargetPlan
from keeptune.penalties.base import Factors, Penalty, Site, Term

Regularizer = Literal["gram", "released"]


def orthogonality(X: Tensor, form: Regularizer) -> tuple[Tensor, Tensor]:
    """Computes how far the columns of X ``(m, r)`` are from orthonormal ones (eq. 11), and the gradient ``(m, r)``.

    Law: ``"released"`` equals ``‖X Xᵀ - I_m‖`` without forming an m x m matrix.
    """
    gap = X.T @ X - torch.eye(X.shape[1], device=X.device, dtype=X.dtype)
    size = torch.linalg.norm(gap) if form == "gram" else (gap.square().sum() + (X.shape[0] - X.shape[1])).sqrt()
    return size, 2 * X @ gap / size.clamp_min(torch.finfo(X.dtype).tiny)


def regularizers(beta: float, gamma: float, form: Regularizer) -> Term:
    """Returns ``beta L_2 + gamma L_3`` of one target."""

    def term(factors: Factors) -> tuple[Tensor, Factors]:
        B, A, d = factors["B"], factors["A"], factors["diag"]
        (of_B, to_B), (of_A, to_A) = orthogonality(B, form), orthogonality(A.T, form)
        value = beta * d.square().sum() + gamma * (of_B + of_A)
        return value, {"B": gamma * to_B, "A": gamma * to_A.T, "diag": 2 * beta * d}

    return term


@dataclass(frozen=True)
class KasaRegularizers(Penalty):
    """What KaSA needs, of the singular values that only KaSA trains.

    Args:
        beta: Weight of L_2.
        gamma: Weight of L_3.
        regularizer: Which matrices are compared with the identity.
        strength: Of both together.
    """

    name = "kasa"
    paper = "Wang et al., KaSA, ICLR 2025"

    beta: float = 1e-4
    gamma: float = 1e-3
    regularizer: Regularizer = "gram"
    strength: float = 1.0

    def tensors(self, site: Site) -> Mapping[str, Tensor]:
        """Returns each target's share of the mean.

        Raises:
            PlanError: The method trains no singular values.
        """
        if "diag" not in site.plan.vectors:
            raise PlanError(
                f"penalty {self.name}, target {site.plan.target.name}",
                got="factors without singular values of their own",
                wanted="the method kasa",
                next_step="Take `method: kasa`, which brings this penalty along.",
            )
        return {f"weight:{site.plan.target.name}": torch.tensor(self.strength / len(site.targets))}

    def bind(self, target_plan: TargetPlan, tensors: Mapping[str, Tensor]) -> Term:
        """Returns the regularisers of one target."""
        share = float(tensors[f"weight:{target_plan.target.name}"])
        return regularizers(self.beta * share, self.gamma * share, self.regularizer)
