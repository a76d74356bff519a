"""Covariances ``E[h hᵀ]`` of inputs and ``E[δ δᵀ]`` of gradients, whole or along directions of W; and the Fisher.

The Fisher matrix per learned token: exact diagonals, and what turns Kronecker factors into it.

A map y = W x, texts with T learned tokens among N, δ_t = d loss / d y_t of the loss summed over the learned tokens,
labels drawn from the model ("sampled"), random signs in their place ("probe", model/head.py), or the data's own
labels ("true", the empirical Fisher).

    g = sum_t δ_t x_tᵀ                        a text's gradient of W; all its N_text tokens, prompt or not  (1)
    F = (1/T) sum_texts E[vec(g) vec(g)ᵀ]     per learned token                                             (2)
    (1/T) sum KL(base, base + E) = 1/2 vec(E)ᵀ F vec(E) + O(E³), not of "true" labels: nats per token       (3)
    diag F = (1/T) sum_texts g ∘ g            ``per="text"``: exact                                         (4)
    F ~ (1/T) sum_t (δ_t δ_tᵀ) ⊗ (x_t x_tᵀ)   ``per="token"``: as if tokens were texts (K-FAC's "expand")   (5)
    F ~ (N/T) Γ ⊗ Ω                           K-FAC: as if δ and x were independent; Γ = E[δ δᵀ] and        (6)
                                              Ω = E[x xᵀ] are means over all N tokens

Draws for the tokens of a text, labels or signs, are independent with gradients of mean zero, so that the mean over
draws of vec(g) vec(g)ᵀ is the sum over tokens that (3) needs. Statistics are means over all N unmasked tokens, as
everywhere; :func:`tokens_per_learned` is N/T. (6) drops the T: a factor N/T belongs to the product, not to either of
its factors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from keeptune.core.artefact import content_key, tensor_fingerprint
from keeptune.core.low_rank import LowRank
from keeptune.core.target import Target
from keeptune.linalg.decompositions import exact_svd
from keeptune.linalg.gram import add_gram, symmetric
from keeptune.model.head import Labels
from keeptune.statistics.collect import StatsView
from keeptune.statistics.request import ADDED, DataRole, GradientRequest, RowRequest, RunningMean, WeightReader

_Lengths = Callable[[], Sequence[int]]  # counts the rows of each text


@dataclass(frozen=True, slots=True)
class InputCovariance(RowRequest):
    """``Ω = E[h hᵀ]``, ``(n, n)``: uncentred, mean over unmasked tokens, products summed in float64.

    Args:
        precision: ``"single"`` forms products and keeps the mean in float32, ``"double"`` in float64: for the bottom of
            the spectrum (:func:`keeptune.linalg.gram.add_gram`).
    """

    precision: Literal["single", "double"] = field(default="single", kw_only=True, metadata=ADDED)

    def numbers(self, target: Target) -> int:
        """Returns ``n²``."""
        return target.in_features**2

    def kept(self, target: Target) -> int:
        """Returns the bytes of the mean."""
        return (4 if self.precision == "single" else 8) * target.in_features**2

    def accumulator(self, target: Target, device: torch.device, weight: WeightReader) -> RunningMean:
        """Returns a sum of ``h hᵀ``."""
        dtype = torch.float32 if self.precision == "single" else torch.float64
        shape = (target.in_features, target.in_features)
        return RunningMean(shape, device, partial(add_gram, dtype=dtype), symmetric, dtype)


@dataclass(frozen=True, slots=True)
class GradientCovariance(GradientRequest):
    """``Σ_δ = E[δ δᵀ]``, ``(m, m)``, where δ = d loss / d y of the loss summed over the tokens to be learned.

    Uncentred, mean over all unmasked tokens, those of the prompt too: they act on the loss through attention.
    """

    def numbers(self, target: Target) -> int:
        """Returns ``m²``."""
        return target.out_features**2

    def accumulator(self, target: Target, device: torch.device, weight: WeightReader) -> RunningMean:
        """Returns a sum of ``δ δᵀ``."""
        shape = (target.out_features, target.out_features)
        return RunningMean(shape, device, lambda total, h, delta, lengths: add_gram(total, delta), symmetric)


@dataclass(frozen=True, slots=True)
class ReleasedCovariance(RowRequest):
    """What LoRA-Null's released code takes for Ω: float16 all through, each example divided by its largest value.

    Kept to show what that costs (``docs/methods/lora-null.md``); not a statistic to build on.
    """

    examples_alone: ClassVar[bool] = True

    def numbers(self, target: Target) -> int:
        """Returns ``n²``."""
        return target.in_features**2

    def accumulator(self, target: Target, device: torch.device, weight: WeightReader) -> _ReleasedSum:
        """Returns a sum over examples."""
        return _ReleasedSum((target.in_features, target.in_features), device, _add_released)


class _ReleasedSum(RunningMean):
    """Sums in float16 all through, no mean."""

    def __post_init__(self) -> None:
        self.total = torch.zeros(self.shape, dtype=torch.float16, device=self.device)

    def result(self) -> Tensor:
        """Returns the sum, float32 holding float16 values."""
        return self.total.float().cpu()


def _add_released(total: Tensor, rows: Tensor) -> None:
    """Adds ``x̂ᵀ x̂ / 256`` of one example, ``(tokens, n)``, where ``x̂ = x / |max x|``, as the released code does."""
    x = rows.half()
    # The largest signed value, then its size: the released code's order, not the largest size.
    x = x / x.max().abs()
    total += (x.T @ x) / 256


@dataclass(frozen=True, slots=True)
class DirectionVariances(GradientRequest):
    """``λ_i = E[(v_iᵀ h)²]`` and ``γ_i = E[(u_iᵀ δ)²]`` along the singular directions of W = U S Vᵀ, ``(2, k)``.

    What FARSS's scores need (eq. 14), without ``(n, n)`` and ``(m, m)`` matrices in memory or on disk.
    """

    def numbers(self, target: Target) -> int:
        """Returns that of the directions that are held beside the sum."""
        return target.out_features * target.in_features

    def accumulator(self, target: Target, device: torch.device, weight: WeightReader) -> RunningMean:
        """Decomposes the weight and returns a sum of squares along its directions."""
        U, _, Vh = exact_svd(weight(), target.name)
        return RunningMean((2, U.shape[1]), device, partial(_add_along, U=U.to(device), Vh=Vh.to(device)))


def _add_along(total: Tensor, h: Tensor, delta: Tensor, _: _Lengths, *, U: Tensor, Vh: Tensor) -> None:
    total[0] += (h.to(Vh) @ Vh.T).square().sum(0)
    total[1] += (delta.to(U) @ U).square().sum(0)


Per = Literal["text", "token"]


def tokens_per_learned(stats: StatsView, count: TokenCount) -> float:
    """Computes N/T, which turns a target's means over tokens into the Fisher per learned token."""
    return float(stats[count]) / stats.learned(count)


@dataclass(frozen=True, slots=True)
class TokenCount(RowRequest):
    """``N``, the number of unmasked tokens that reach a target: all of them, but for experts. A scalar."""

    def numbers(self, target: Target) -> int:
        """Returns one."""
        return 1

    def accumulator(self, target: Target, device: torch.device, weight: WeightReader) -> _Count:
        """Returns a counter."""
        return _Count((), device, lambda total, rows: None)


class _Count(RunningMean):
    """Counts rows."""

    def result(self) -> Tensor:
        """Returns a scalar, float64: float32 cannot count beyond 2^24."""
        return torch.tensor(self.tokens, dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class WeightFisher(GradientRequest):
    """``diag F`` of the whole weight, over T/N: ``(m, n)``, the mean over tokens of squared gradients (4) or (5).

    EWC's Fisher is (4): the squared gradient of each text, not the square of a batch's mean gradient, which EWC-LoRA's
    code takes and in which texts cancel each other.

    Args:
        per: ``"text"`` squares the gradient of each text, ``"token"`` that of each token.
    """

    per: Per = field(default="text", kw_only=True)

    def numbers(self, target: Target) -> int:
        """Returns ``mn``."""
        return target.out_features * target.in_features

    def accumulator(self, target: Target, device: torch.device, weight: WeightReader) -> RunningMean:
        """Returns a sum of squares, products in float32."""
        return RunningMean((target.out_features, target.in_features), device, partial(_add_squares, per=self.per))


def _add_squares(total: Tensor, h: Tensor, delta: Tensor, lengths: _Lengths, *, per: Per) -> None:
    h, delta = h.float(), delta.float()
    if per == "token":
        total += delta.square().T @ h.square()
        return
    for x, d in zip(*(torch.split(rows, list(lengths())) for rows in (h, delta)), strict=True):
        total += (d.T @ x).square_()


@dataclass(frozen=True, slots=True)
class LoraFisher(GradientRequest):
    """``diag F`` of the factors of y = W_0 x + s B A x, over T/N: ``(r, m + n)``, of Bᵀ and of A (4).

    ``g_B = sum_t s δ_t (A x_t)ᵀ`` and ``g_A = sum_t s (Bᵀ δ_t) x_tᵀ``, at the start, where the model is the base.
    Make it with :func:`lora_fisher`; ``scale`` is s, and the fingerprint that of the factors.
    """

    scale: float
    fingerprint: str
    factors: LowRank = field(compare=False, repr=False)

    def numbers(self, target: Target) -> int:
        """Returns ``r (m + n)``."""
        return self.factors.rank * (target.out_features + target.in_features)

    def accumulator(self, target: Target, device: torch.device, weight: WeightReader) -> RunningMean:
        """Returns sums of squares of Bᵀ and of A side by side, products in float32."""
        shape = (self.factors.rank, target.out_features + target.in_features)
        factors = self.factors.to(torch.float32, device)
        return RunningMean(shape, device, partial(_add_factor_squares, factors=factors, scale=self.scale))


def _add_factor_squares(
    total: Tensor, h: Tensor, delta: Tensor, lengths: _Lengths, *, factors: LowRank, scale: float
) -> None:
    B, A = factors.B, factors.A
    of_B, of_A = total[:, : len(B)], total[:, len(B) :]
    h, delta = h.to(A), scale * delta.to(B)
    a, b = h @ A.T, delta @ B
    texts = (torch.split(rows, list(lengths())) for rows in (h, delta, a, b))
    for x, d, u, v in zip(*texts, strict=True):
        of_B += (u.T @ d).square_()
        of_A += (v.T @ x).square_()


def lora_fisher(data: DataRole, labels: Labels, factors: LowRank, scale: float, **draws: Any) -> LoraFisher:
    """Returns the request for the diagonals at factors ``B`` and ``A`` with scale s; their content is in the key.

    ``draws`` are the request's ``seed``, ``probes`` and ``examples``.
    """
    fingerprint = content_key([tensor_fingerprint(factors.B), tensor_fingerprint(factors.A)])
    return LoraFisher(data, labels, scale, fingerprint, factors, **draws)


def split_diagonals(value: Tensor, out_features: int) -> LowRank:
    """Splits a :class:`LoraFisher`: ``diag F_BB`` in the place of B, ``(m, r)``, ``diag F_AA`` in A's, ``(r, n)``."""
    return LowRank(B=value[:, :out_features].T.contiguous(), A=value[:, out_features:].contiguous())
