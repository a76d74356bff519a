"""The Fisher matrix per learned token: exact diagonals, and what turns Kronecker factors into it.

A map y = W x, texts with T learned tokens among N, δ_t = d loss / d y_t of the loss summed over the learned tokens,
labels drawn from the model ("sampled") or the data's own ("true", the empirical Fisher).

    g = sum_t δ_t x_tᵀ                        a text's gradient of W; all its N_text tokens, prompt or not  (1)
    F = (1/T) sum_texts E[vec(g) vec(g)ᵀ]     per learned token                                             (2)
    (1/T) sum KL(base, base + E) = 1/2 vec(E)ᵀ F vec(E) + O(E³), labels "sampled": nats per token           (3)
    diag F = (1/T) sum_texts g ∘ g            ``per="text"``: exact                                         (4)
    F ~ (1/T) sum_t (δ_t δ_tᵀ) ⊗ (x_t x_tᵀ)   ``per="token"``: as if tokens were texts (K-FAC's "expand")   (5)
    F ~ (N/T) Γ ⊗ Ω                           K-FAC: as if δ and x were independent; Γ = E[δ δᵀ] and        (6)
                                              Ω = E[x xᵀ] are means over all N tokens

Draws of the labels of a text's tokens are independent with gradients of mean zero, so that the mean over draws of
vec(g) vec(g)ᵀ is the sum over tokens that (3) needs. Statistics are means over all N unmasked tokens, as everywhere;
:func:`tokens_per_learned` is N/T. (6) drops the T: a factor N/T belongs to the product, not to either of its factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from keeptune.core.artefact import content_key, tensor_fingerprint
from keeptune.core.errors import StatisticsError
from keeptune.core.low_rank import LowRank
from keeptune.core.target import Target
from keeptune.model.runner import Labels
from keeptune.statistics.collect import StatsView
from keeptune.statistics.request import DataRole, PassKind, WeightReader
from keeptune.statistics.validation import finite, need_tokens

__all__ = [
    "LoraFisher",
    "LoraFisherAccumulator",
    "Per",
    "TokenCount",
    "TokenCounter",
    "WeightFisher",
    "WeightFisherAccumulator",
    "lora_fisher",
    "split_diagonals",
    "tokens_per_learned",
]

Per = Literal["text", "token"]


def tokens_per_learned(stats: StatsView, count: TokenCount) -> float:
    """Compute N/T, which turns means over tokens into the Fisher per learned token.

    Args:
        stats: A target's statistics, :class:`TokenCount` among them.
        count: That request.

    Returns:
        How many tokens reached the target, over how many are learned.
    """
    return float(stats[count]) / stats.learned(count)


@dataclass(frozen=True, slots=True)
class TokenCount:
    """``N``, the number of unmasked tokens that reach a target: all of them, but for experts. A scalar.

    Args:
        data: Which data.
        examples: How many examples of each set, the first ones; None is all.
    """

    data: DataRole
    examples: int | None = None
    version: ClassVar[int] = 1
    kind: ClassVar[PassKind] = "forward"
    labels: ClassVar[Labels | None] = None
    seed: ClassVar[int] = 0
    examples_alone: ClassVar[bool] = False

    def numbers(self, target: Target) -> int:
        """Count the sum's numbers: one."""
        return 1

    def site(self, target: Target) -> str:
        """Name the input group."""
        return target.input_group

    def accumulator(self, target: Target, device: torch.device, weight: WeightReader) -> TokenCounter:
        """Start a sum."""
        return TokenCounter()


@dataclass
class TokenCounter:
    """Counts rows."""

    tokens: int = 0

    def add(self, rows: Tensor) -> None:
        """Count the rows of one batch.

        Args:
            rows: ``(tokens, n)``.
        """
        self.tokens += rows.shape[0]

    def result(self, module: str) -> Tensor:
        """Finish.

        Args:
            module: The module's name, for the error message.

        Returns:
            A scalar, float64: float32 cannot count beyond 2^24.

        Raises:
            StatisticsError: No token was seen.
        """
        need_tokens(self.tokens, module)
        return torch.tensor(self.tokens, dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class WeightFisher:
    """``diag F`` of the whole weight, over T/N: ``(m, n)``, the mean over tokens of squared gradients (4) or (5).

    EWC's Fisher is (4): the squared gradient of each text, not the square of a batch's mean gradient, which EWC-LoRA's
    code takes and in which texts cancel each other.

    Args:
        data: Which data.
        labels: ``"true"`` or ``"sampled"``.
        per: ``"text"`` squares the gradient of each text, ``"token"`` that of each token.
        seed: Seed of the drawn labels.
        examples: How many examples of each set, the first ones; None is all.
    """

    data: DataRole
    labels: Labels
    per: Per = "text"
    seed: int = 0
    examples: int | None = None
    version: ClassVar[int] = 1
    examples_alone: ClassVar[bool] = False

    @property
    def kind(self) -> PassKind:
        """Need to know which row is of which text, where texts are squared."""
        return "texts" if self.per == "text" else "joint"

    def numbers(self, target: Target) -> int:
        """Count the sum's numbers: ``mn``."""
        return target.out_features * target.in_features

    def site(self, target: Target) -> str:
        """Name the target itself."""
        return target.name

    def accumulator(self, target: Target, device: torch.device, weight: WeightReader) -> WeightFisherAccumulator:
        """Start a sum."""
        return WeightFisherAccumulator(target.out_features, target.in_features, self.per, device)


@dataclass
class WeightFisherAccumulator:
    """Sums squared gradients, products in float32, the sum in float64.

    Args:
        out_features: m.
        in_features: n.
        per: What is squared.
        device: Where the ``(m, n)`` sum is kept.
    """

    out_features: int
    in_features: int
    per: Per
    device: torch.device
    tokens: int = 0
    total: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Start from zero."""
        self.total = torch.zeros(self.out_features, self.in_features, dtype=torch.float64, device=self.device)

    def add(self, h: Tensor, delta: Tensor, lengths: Sequence[int] = ()) -> None:
        """Add the rows of one batch.

        Args:
            h: ``(tokens, n)``.
            delta: ``(tokens, m)``.
            lengths: How many rows are of each text, where texts are squared.
        """
        h, delta = h.to(self.device, torch.float32), delta.to(self.device, torch.float32)
        if self.per == "token":
            self.total += delta.square().T @ h.square()
        else:
            for x, d in zip(torch.split(h, list(lengths)), torch.split(delta, list(lengths)), strict=True):
                self.total += (d.T @ x).square_()
        self.tokens += h.shape[0]

    def result(self, module: str) -> Tensor:
        """Finish.

        Args:
            module: The module's name, for the error message.

        Returns:
            ``(m, n)``, float32, on the CPU.

        Raises:
            StatisticsError: No token was seen, or a row was NaN or infinite.
        """
        need_tokens(self.tokens, module)
        return finite((self.total / self.tokens).float().cpu(), module)


@dataclass(frozen=True, slots=True)
class LoraFisher:
    """``diag F`` of the factors of y = W_0 x + s B A x, over T/N: ``(r, m + n)``, of Bᵀ and of A; (4) or (5).

    ``g_B = sum_t s δ_t (A x_t)ᵀ`` and ``g_A = sum_t s (Bᵀ δ_t) x_tᵀ``, at the start, where the model is the base.
    Make it with :func:`lora_fisher`.

    Args:
        data: Which data.
        labels: ``"true"`` or ``"sampled"``.
        scale: s.
        fingerprint: Of the factors.
        factors: ``B`` and ``A``, where the Fisher is taken.
        per: ``"text"`` squares the gradient of each text, ``"token"`` that of each token.
        seed: Seed of the drawn labels.
        examples: How many examples of each set, the first ones; None is all.
    """

    data: DataRole
    labels: Labels
    scale: float
    fingerprint: str
    factors: LowRank = field(compare=False, repr=False)
    per: Per = "text"
    seed: int = 0
    examples: int | None = None
    version: ClassVar[int] = 1
    examples_alone: ClassVar[bool] = False

    @property
    def kind(self) -> PassKind:
        """Need to know which row is of which text, where texts are squared."""
        return "texts" if self.per == "text" else "joint"

    def numbers(self, target: Target) -> int:
        """Count the sum's numbers: ``r (m + n)``."""
        return self.factors.rank * (target.out_features + target.in_features)

    def site(self, target: Target) -> str:
        """Name the target itself."""
        return target.name

    def accumulator(self, target: Target, device: torch.device, weight: WeightReader) -> LoraFisherAccumulator:
        """Start a sum."""
        return LoraFisherAccumulator(self.factors.to(torch.float32, device), self.scale, self.per)


def lora_fisher(
    data: DataRole,
    labels: Labels,
    factors: LowRank,
    scale: float,
    *,
    per: Per = "text",
    seed: int = 0,
    examples: int | None = None,
) -> LoraFisher:
    """Ask for the diagonals at some factors; their content is a part of the key.

    Args:
        data: Which data.
        labels: ``"true"`` or ``"sampled"``.
        factors: ``B`` and ``A``.
        scale: s.
        per: What is squared.
        seed: Seed of the drawn labels.
        examples: How many examples of each set; None is all.

    Returns:
        The request.
    """
    fingerprint = content_key([tensor_fingerprint(factors.B), tensor_fingerprint(factors.A)])
    return LoraFisher(data, labels, scale, fingerprint, factors, per, seed, examples)


@dataclass
class LoraFisherAccumulator:
    """Sums squared gradients of the factors (of Bᵀ left, of A right), products in float32, the sums in float64.

    Args:
        factors: ``B`` and ``A``, float32, where the sums are kept.
        scale: s.
        per: What is squared.
    """

    factors: LowRank
    scale: float
    per: Per
    tokens: int = 0
    left: Tensor = field(init=False)
    right: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Start from zero."""
        self.left = torch.zeros_like(self.factors.B.T, dtype=torch.float64)
        self.right = torch.zeros_like(self.factors.A, dtype=torch.float64)

    def add(self, h: Tensor, delta: Tensor, lengths: Sequence[int] = ()) -> None:
        """Add the rows of one batch.

        Args:
            h: ``(tokens, n)``.
            delta: ``(tokens, m)``.
            lengths: How many rows are of each text, where texts are squared.
        """
        B, A = self.factors.B, self.factors.A
        h, delta = h.to(A), self.scale * delta.to(B)
        a, b = h @ A.T, delta @ B
        if self.per == "token":
            self.left += a.square().T @ delta.square()
            self.right += b.square().T @ h.square()
        else:
            parts = (torch.split(rows, list(lengths)) for rows in (h, delta, a, b))
            for x, d, u, v in zip(*parts, strict=True):
                self.left += (u.T @ d).square_()
                self.right += (v.T @ x).square_()
        self.tokens += h.shape[0]

    def result(self, module: str) -> Tensor:
        """Finish.

        Args:
            module: The module's name, for the error message.

        Returns:
            ``(r, m + n)``, float32, on the CPU.

        Raises:
            StatisticsError: No token was seen, or a row was NaN or infinite.
        """
        need_tokens(self.tokens, module)
        return finite((torch.cat([self.left, self.right], dim=1) / self.tokens).float().cpu(), module)


def split_diagonals(value: Tensor, out_features: int) -> LowRank:
    """Read what :class:`LoraFisher` gives.

    Args:
        value: ``(r, m + n)``.
        out_features: m.

    Returns:
        ``diag F_BB`` in the place of B, ``(m, r)``, and ``diag F_AA`` in that of A, ``(r, n)``.

    Raises:
        StatisticsError: The table has no columns for A.
    """
    if value.shape[1] <= out_features:
        raise StatisticsError(
            "LoraFisher",
            got=f"{value.shape[1]} columns",
            wanted=f"more than the {out_features} of the output",
            next_step="Pass the number of outputs of the target that was measured.",
        )
    return LowRank(B=value[:, :out_features].T.contiguous(), A=value[:, out_features:].contiguous())
