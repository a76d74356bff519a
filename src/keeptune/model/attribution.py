r"""How much each output of a block's MLP says for the next token: LoKI's Knowledge Vector Attribution (KVA).

LoKI (Wang et al., "LoKI: Low-damage Knowledge Implanting of Large Language Models", AAAI 2026). A node is one output
coordinate j of a block's down-projection, z_l = W_down u_l, and belongs to row j of W_down. Integrated gradients, one
block at a time, all others at the values that follow:

    Attr_lj(x) = ∫₀¹ ∂F(z'_l + α (z_l - z'_l)) / ∂z_lj dα                                                    (4)
               ≈ Σ_k w_k ∂F(z'_l + α_k (z_l - z'_l)) / ∂z_lj                                                 (5)

with F the score of one token after the last one of the text, and z' the baseline. The paper and its two releases differ
in nearly all of it (:class:`Integral` has the options): the paper writes the plain mean of gradients of the logit, both
releases multiply by (z - z'), as integrated gradients do, and take the probability; the first release scales z at the
last token only and keeps the left end of each step, the second scales all tokens, from a run on token 0, by trapezoids.

Completeness: multiplied, the attributions of a block sum to F(z) - F(z') as steps grow, where the last token alone is
scaled.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from keeptune.core.errors import ModelError, RecipeError, StatisticsError
from keeptune.data.calibration import Batch
from keeptune.model.blocks import head_of
from keeptune.model.down import down_projections
from keeptune.model.passes import put, take
from keeptune.model.runner import arguments_of, still

__all__ = ["Attributor", "Baseline", "Integral", "Positions", "Rule", "Score", "quadrature"]

Positions = Literal["last", "all"]
Baseline = Literal["zero", "pad"]
Score = Literal["probability", "logit"]
Rule = Literal["left", "right", "trapezoid", "gauss-legendre"]


@dataclass(frozen=True, slots=True)
class Integral:
    """What is integrated, from where, and how.

    Args:
        positions: Scale the down-projection's output at the last token, or at all; kept is the last token's.
        baseline: Where the path starts: at zero, or at the output in a run on padding tokens only.
        pad_token: The padding token's id; the current release takes 0, whatever the tokenizer.
        target: F: the token's probability or its logit.
        rule: Which points of [0, 1] are taken, and with which weights.
        steps: How many points.
        times_activation: Multiply by z - z'.
    """

    positions: Positions = "last"
    baseline: Baseline = "zero"
    pad_token: int = 0
    target: Score = "probability"
    rule: Rule = "left"
    steps: int = 7
    times_activation: bool = True

    def __post_init__(self) -> None:
        """Check the ranges."""
        least = 2 if self.rule == "trapezoid" else 1
        if self.steps < least:
            raise RecipeError(
                "attribution.steps",
                got=f"{self.steps} with rule {self.rule}",
                wanted=f"{least} or more",
                next_step="The paper takes 7.",
            )
        if self.pad_token < 0:
            raise RecipeError("attribution.pad_token", got=f"{self.pad_token}", wanted="a token id", next_step="Try 0.")


def quadrature(rule: Rule, steps: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Give a rule's points and weights on [0, 1].

    Law: weights sum to 1. Left and right are exact for constants, the trapezoid for lines, Gauss-Legendre for
    polynomials of degree 2 m - 1. (Captum's trapezoid weights sum to (m - 1) / m only.)

    Args:
        rule: The rule.
        steps: m, the number of points; two or more for the trapezoid.

    Returns:
        ``α_k`` and ``w_k``.

    >>> quadrature("left", 4)
    ((0.0, 0.25, 0.5, 0.75), (0.25, 0.25, 0.25, 0.25))
    >>> quadrature("trapezoid", 3)
    ((0.0, 0.5, 1.0), (0.25, 0.5, 0.25))
    """
    if rule == "gauss-legendre":
        points, weights = np.polynomial.legendre.leggauss(steps)
        return tuple(((points + 1) / 2).tolist()), tuple((weights / 2).tolist())
    if rule == "trapezoid":
        inner = 1 / (steps - 1)
        ends = (inner / 2,)
        return tuple(k * inner for k in range(steps)), (*ends, *(inner,) * (steps - 2), *ends)
    first = 0 if rule == "left" else 1
    return tuple((k + first) / steps for k in range(steps)), (1 / steps,) * steps


@dataclass
class _Clean:
    """What the unchanged run and the baseline's left behind.

    Args:
        outputs: ``(B, W, D)`` of each down-projection.
        starts: The same of the baseline.
        wanted: ``(B,)``, the scored tokens.
    """

    outputs: list[Tensor] = field(default_factory=list)
    starts: list[Tensor] = field(default_factory=list)
    wanted: Tensor = field(default_factory=lambda: torch.empty(0))


class Attributor:
    """Attributes batches of texts.

    Args:
        model: A causal language model without adapters.
        integral: What is integrated.
        chunk: Tokens in a pass; it changes speed and memory only.
    """

    def __init__(self, model: PreTrainedModel, integral: Integral, *, chunk: int = 2048) -> None:
        if head_of(model) or not model.can_generate() or model.config.is_encoder_decoder:
            raise ModelError(
                type(model).__name__,
                got="a model that writes no next token",
                wanted="a causal language model: the score of the token after the last one is attributed",
                next_step="Use the base's causal language model.",
            )
        self.model = model
        self.integral = integral
        self.chunk = chunk
        self.targets = down_projections(model)
        self.modules = tuple(model.get_submodule(target.name) for target in self.targets)

    @property
    def layers(self) -> tuple[int, ...]:
        """The blocks that have a down-projection."""
        return tuple(target.layer for target in self.targets)

    def attribute(self, batch: Batch, wanted: Tensor | None = None) -> Tensor:
        """Attribute the token after the last one of each text.

        Args:
            batch: Texts, the padding on either side.
            wanted: ``(B,)``, the token ids to score; None for the model's own most likely ones.

        Returns:
            ``(B, layers, nodes)``, float32, on the CPU; the sign kept.

        Raises:
            StatisticsError: An attribution is not finite.
        """
        with still(self.model):
            mask = batch.attention_mask.to(self.model.device)
            last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(dim=1, keepdim=True)
            clean = self._clean(batch, mask, last, wanted)
            found = torch.stack([self._layer(batch, mask, last, clean, at) for at in range(len(self.modules))], dim=1)
        if not bool(torch.isfinite(found).all()):
            raise StatisticsError(
                "attribution",
                got="NaN or infinite numbers",
                wanted="finite ones",
                next_step="Load the model in float32 or bfloat16.",
            )
        return found.cpu()

    def _clean(self, batch: Batch, mask: Tensor, last: Tensor, wanted: Tensor | None) -> _Clean:
        clean = _Clean()
        with torch.no_grad():
            logits = take(self._watched(batch, mask, clean.outputs), last)[:, 0]
            clean.wanted = logits.float().argmax(dim=-1) if wanted is None else wanted.to(logits.device)
            if self.integral.baseline == "pad":
                pads = Batch(torch.full_like(batch.input_ids, self.integral.pad_token), batch.attention_mask)
                self._watched(pads, mask, clean.starts)
            else:
                clean.starts = [torch.zeros_like(output) for output in clean.outputs]
        return clean

    def _watched(self, batch: Batch, mask: Tensor, outputs: list[Tensor]) -> Tensor:
        with ExitStack() as stack:
            for module in self.modules:
                handle = module.register_forward_hook(lambda *seen: outputs.append(seen[2].detach()))
                stack.callback(handle.remove)
            return cast(Tensor, self.model(**arguments_of(batch, mask)).logits)

    def _layer(self, batch: Batch, mask: Tensor, last: Tensor, clean: _Clean, at: int) -> Tensor:
        """Attribute one block, by one run of the whole model for each point: works on any model."""
        output, start = clean.outputs[at].float(), clean.starts[at].float()
        total = torch.zeros_like(output[:, 0])
        points, weights = quadrature(self.integral.rule, self.integral.steps)
        for alpha, weight in zip(points, weights, strict=True):
            path = start + alpha * (output - start)
            leaf = take(path, last).requires_grad_(True)
            base = output if self.integral.positions == "last" else path
            here = torch.arange(mask.shape[1], device=mask.device) == last
            handle = self.modules[at].register_forward_hook(_replacing(base, here, leaf))
            with torch.enable_grad():
                try:
                    logits = take(self.model(**arguments_of(batch, mask)).logits, last)[:, 0]
                finally:
                    handle.remove()
                (gradient,) = torch.autograd.grad(score(logits, clean.wanted, self.integral.target).sum(), leaf)
            total += weight * gradient[:, 0]
        return total * take(output - start, last)[:, 0] if self.integral.times_activation else total


def score(logits: Tensor, wanted: Tensor, target: Score) -> Tensor:
    """Compute F, in float32 or better.

    Args:
        logits: ``(..., vocabulary)``.
        wanted: ``(...)``, token ids.
        target: Which score.

    Returns:
        ``(...)``, the probability or the logit.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    chosen = logits.gather(-1, wanted[..., None]).squeeze(-1)
    return chosen if target == "logit" else (chosen - logits.logsumexp(dim=-1)).exp()


def _replacing(base: Tensor, here: Tensor, leaf: Tensor) -> Any:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        return put(output, torch.where(here[..., None], leaf, base).to(output.dtype))

    return hook
