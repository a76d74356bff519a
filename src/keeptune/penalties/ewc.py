"""EWC: hold each weight by how much the loss on knowledge data depends on it.

Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks" (1612.00796), for low-rank changes as in
EWC-LoRA (2602.17559): the Fisher is that of the whole weight, not of A and B.

    P = λ/2 sum F ∘ E²,   E = s (B A - B_0 A_0)                                   (1)
    F = (1/T) sum_texts g ∘ g,   g the gradient of a text's loss in W             (2)
    dP/dB = λ s (F ∘ E) Aᵀ,   dP/dA = λ s Bᵀ (F ∘ E)                              (3)

With T the number of learned tokens, (1) is in nats per token, as the other forms of the Fisher are (laplace). F is
m x n and stays in memory: as much as the weight. (1) and (3) go through it some rows at a time, so that no other m x n
matrix is formed. Departure from EWC-LoRA's code: that squares the mean gradient of a batch, in which texts cancel each
other, times the batch size; (2) is what Fisher information is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from keeptune.core.low_rank import LowRank
from keeptune.core.plan import TargetPlan
from keeptune.penalties.base import OnChange, Site, Term, start_of
from keeptune.penalties.kronecker import change_since
from keeptune.penalties.option_checks import check_counts, check_strength
from keeptune.statistics.fisher import Per, TokenCount, WeightFisher, tokens_per_learned
from keeptune.statistics.request import DataRole, Labels, Request

__all__ = ["DiagonalChange", "Ewc", "Stored"]

Stored = Literal["float32", "bfloat16"]
_DTYPES: dict[Stored, torch.dtype] = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_NUMBERS = 1 << 20  # in a temporary


@dataclass(frozen=True, slots=True, eq=False)
class DiagonalChange:
    """``w sum F ∘ E²`` of the change since the start.

    Laws: the value is that of the dense E; it does not depend on the chunks; ``(G A, B G⁻¹)`` has the value of
    ``(A, B)``; it is 0, and so is its gradient, at the start.

    Args:
        fisher: F, ``(m, n)``, of any floating dtype; not negative.
        scale: s.
        weight: w, a number or a scalar tensor.
        start: ``B_0`` and ``A_0``; None where ``B_0 A_0 = 0``.
        numbers: How many numbers a temporary may hold.
    """

    fisher: Tensor
    scale: float
    weight: float | Tensor
    start: LowRank | None = None
    numbers: int = _NUMBERS

    def value(self, delta: LowRank) -> Tensor:
        """Compute (1)."""
        L, R = change_since(delta, self.start)
        parts = [(held * E).sum() for _, held, E in self._chunks(L, R)]
        return self.weight * torch.stack(parts).sum()

    def value_and_grad(self, delta: LowRank) -> tuple[Tensor, LowRank]:
        """Compute (1) and (3)."""
        L, R = change_since(delta, self.start)
        values, to_B, to_A = [], [], torch.zeros_like(delta.A)
        for rows, held, E in self._chunks(L, R):
            values.append((held * E).sum())
            to_B.append(held @ delta.A.T)
            to_A = to_A + delta.B[rows].T @ held
        w = 2 * self.weight * self.scale
        return self.weight * torch.stack(values).sum(), LowRank(B=w * torch.cat(to_B), A=w * to_A)

    def _chunks(self, L: Tensor, R: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Go through F by rows: which, ``F ∘ E`` and ``E``."""
        step = max(self.numbers // R.shape[1], 1)
        for first in range(0, L.shape[0], step):
            rows = slice(first, first + step)
            E = self.scale * (L[rows] @ R)
            yield rows, self.fisher[rows].to(E.dtype) * E, E


@dataclass(frozen=True)
class Ewc:
    """The diagonal Fisher of the weights, on the weight change.

    Args:
        strength: λ; at 1 a nat lost on the knowledge costs a nat of task loss, to second order.
        labels: ``"sampled"`` draws what the model itself would say (the Fisher), ``"true"`` takes the data's tokens
            (the empirical Fisher).
        per: ``"text"`` squares the gradient of each text (2), ``"token"`` that of each token.
        batches: How many batches of each knowledge set are used; None is all of it.
        batch_size: Examples per batch; it only says how much ``batches`` is.
        stored: The dtype that F is kept in: ``"bfloat16"`` halves its memory, and rounds it by at most 0.4%.
        label_seed: Seed of sampled labels.

    Raises:
        PlanError: An option is out of range.
    """

    name: ClassVar[str] = "ewc"
    paper: ClassVar[str] = "Kirkpatrick et al., EWC, 1612.00796; EWC-LoRA, 2602.17559"

    strength: float = 1.0
    labels: Labels = "sampled"
    per: Per = "text"
    batches: int | None = None
    batch_size: int = 8
    stored: Stored = "float32"
    label_seed: int = 0

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            PlanError: One is out of range.
        """
        check_strength(self.strength, self.name)
        check_counts(self.name, batches=self.batches, batch_size=self.batch_size)

    @property
    def data(self) -> frozenset[DataRole]:
        """Need knowledge."""
        return frozenset({"knowledge"})

    def requests(self, target_plan: TargetPlan) -> frozenset[Request]:
        """Need the diagonal Fisher, and what makes it one per learned token."""
        return frozenset({self._fisher(), self._count()})

    def tensors(self, site: Site) -> Mapping[str, Tensor]:
        """Keep F over T/N, and ``λ/2 N/T``."""
        name = site.plan.target.name
        return {
            f"F:{name}": site.stats[self._fisher()].to(_DTYPES[self.stored]),
            f"weight:{name}": torch.tensor(self.strength / 2 * tokens_per_learned(site.stats, self._count())),
        }

    def bind(self, target_plan: TargetPlan, tensors: Mapping[str, Tensor]) -> Term:
        """Make (1) of one target."""
        name = target_plan.target.name
        weight = tensors[f"weight:{name}"]
        start = start_of(target_plan, weight.device)
        return OnChange(DiagonalChange(tensors[f"F:{name}"], target_plan.scale, weight, start))

    def _fisher(self) -> WeightFisher:
        return WeightFisher("knowledge", self.labels, self.per, self.label_seed, self._examples())

    def _count(self) -> TokenCount:
        return TokenCount("knowledge", self._examples())

    def _examples(self) -> int | None:
        return None if self.batches is None else self.batches * self.batch_size
