"""KaSA's two regularisers (methods/kasa.py), the means over the targets.

beta L_2 + gamma L_3
L_2 = sum d²                                    (9, 10)
L_3 = ‖BᵀB - I‖ + ‖AAᵀ - I‖                     (11)
d L_3 / dB = 2 B (BᵀB - I) / ‖BᵀB - I‖, and alike for A
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from keeptune.core.errors import PlanError
from keeptune.core.plan import TargetPlan
from keeptune.core.trained_tensors import TensorName
from keeptune.penalties.base import Site, Term
from keeptune.statistics.request import DataRole, Request

__all__ = ["KasaRegularizers", "Orthogonality", "Regularizer", "orthogonality"]

Regularizer = Literal["gram", "released"]


def orthogonality(B: Tensor, A: Tensor, form: Regularizer) -> Tensor:
    """Measure how far B's columns and A's rows are from orthonormal ones (eq. 11).

    Law: ``"released"`` equals ``‖B Bᵀ - I_m‖ + ‖Aᵀ A - I_n‖`` without forming an m x m or n x n matrix.

    Args:
        B: ``(m, r)``.
        A: ``(r, n)``.
        form: Which matrices are compared with the identity.

    Returns:
        L_3, a scalar.
    """
    return _distance(B, form)[0] + _distance(A.T, form)[0]


def _distance(X: Tensor, form: Regularizer) -> tuple[Tensor, Tensor]:
    """Measure ``‖XᵀX - I‖``, or ``‖X Xᵀ - I‖`` of the larger matrix, and its gradient."""
    gap = X.T @ X - torch.eye(X.shape[1], device=X.device, dtype=X.dtype)
    size = torch.linalg.norm(gap) if form == "gram" else (gap.square().sum() + (X.shape[0] - X.shape[1])).sqrt()
    return size, 2 * X @ gap / size.clamp_min(torch.finfo(X.dtype).tiny)


@dataclass(frozen=True, slots=True)
class Orthogonality:
    """The regularisers of one target.

    Args:
        beta: Weight of L_2.
        gamma: Weight of L_3.
        form: Which matrices are compared with the identity.
    """

    beta: float
    gamma: float
    form: Regularizer

    def value_and_grad(self, factors: Mapping[TensorName, Tensor]) -> tuple[Tensor, Mapping[TensorName, Tensor]]:
        """Compute both and their gradients."""
        B, A, d = factors["B"], factors["A"], factors["diag"]
        (of_B, to_B), (of_A, to_A) = _distance(B, self.form), _distance(A.T, self.form)
        value = self.beta * d.square().sum() + self.gamma * (of_B + of_A)
        return value, {"B": self.gamma * to_B, "A": self.gamma * to_A.T, "diag": 2 * self.beta * d}


@dataclass(frozen=True)
class KasaRegularizers:
    """What KaSA asks for; it needs the singular values that only KaSA trains.

    Args:
        beta: Weight of L_2.
        gamma: Weight of L_3.
        regularizer: Which matrices are compared with the identity.
        strength: Of both together.
    """

    name: ClassVar[str] = "kasa"
    paper: ClassVar[str] = "Wang et al., KaSA, ICLR 2025"

    beta: float = 1e-4
    gamma: float = 1e-3
    regularizer: Regularizer = "gram"
    strength: float = 1.0

    @property
    def data(self) -> frozenset[DataRole]:
        """Need nothing."""
        return frozenset()

    def requests(self, target_plan: TargetPlan) -> frozenset[Request]:
        """Need nothing."""
        return frozenset()

    def tensors(self, site: Site) -> Mapping[str, Tensor]:
        """Keep each target's share of the mean.

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
        """Make the regularisers of one target."""
        share = float(tensors[f"weight:{target_plan.target.name}"])
        return Orthogonality(self.beta * share, self.gamma * share, self.regularizer)
