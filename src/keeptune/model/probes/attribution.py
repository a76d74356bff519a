r"""How much each output of a block's MLP contributes to the next token: LoKI's Knowledge Vector Attribution (KVA).

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

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from keeptune.core.errors import ModelError, RecipeError, StatisticsError
from keeptune.core.offload import device_of
from keeptune.data.calibration import Batch
from keeptune.model.blocks import blocks_of, head_of
from keeptune.model.down_projections import down_projections
from keeptune.model.probes.attribution_passes import ScaledNodes, last_columns
from keeptune.model.probes.block_calls import fast_or_none, probabilities, take
from keeptune.model.runner import arguments_of, still

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
    """Returns the ``steps`` points ``α_k`` and weights ``w_k`` of a rule on [0, 1]; the trapezoid takes two or more.

    Law: weights sum to 1. Left and right are exact for constants, the trapezoid for lines, Gauss-Legendre for
    polynomials of degree 2 m - 1. (Captum's trapezoid weights sum to (m - 1) / m only.)

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


class Attributor:
    """Attributes batches of texts, with a causal language model without adapters.

    Args:
        chunk: Tokens in a pass; it changes speed and memory only.
        plain: Do one run of the model per point even where the fast way applies.
    """

    def __init__(self, model: PreTrainedModel, integral: Integral, *, chunk: int = 2048, plain: bool = False) -> None:
        if head_of(model) or not model.can_generate() or model.config.is_encoder_decoder:
            raise ModelError(
                type(model).__name__,
                got="a model that writes no next token",
                wanted="a causal language model: the score of the token after the last one is attributed",
                next_step="Use the base's causal language model.",
            )
        self.targets = down_projections(model)
        self.integral = integral
        self.points, self.weights = quadrature(integral.rule, integral.steps)
        self.nodes = ScaledNodes(
            model,
            blocks_of(model),
            tuple(model.get_submodule(target.name) for target in self.targets),
            tuple(target.layer for target in self.targets),
            chunk,
            partial(score, target=integral.target),
        )
        # None: not tried yet.
        self.fits: bool | None = False if plain else None

    @property
    def layers(self) -> tuple[int, ...]:
        """The blocks that have a down-projection."""
        return self.nodes.layers

    def attribute(self, batch: Batch, wanted: Tensor | None = None) -> Tensor:
        """Attributes the token after the last one of each text: ``(B, layers, nodes)``, signed, float32, on the CPU.

        Args:
            batch: Texts, the padding on either side.
            wanted: ``(B,)``, the token ids to score; None for the model's own most likely ones.

        Raises:
            StatisticsError: An attribution is not finite.
        """
        with still(self.nodes.model):
            values = self._try_fast(batch, wanted) if self.fits is None else None
            if values is None:
                values = (self._fast if self.fits else self._plain)(batch, wanted)[0]
        if not bool(torch.isfinite(values).all()):
            raise StatisticsError(
                "attribution",
                got="NaN or infinite numbers",
                wanted="finite ones",
                next_step="Load the model in float32 or bfloat16.",
            )
        return values.cpu()

    @property
    def _pad(self) -> int | None:
        return self.integral.pad_token if self.integral.baseline == "pad" else None

    def _fast(self, batch: Batch, wanted: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the attributions and ``(states, B)`` scores."""
        nodes, whole = self.nodes, self.integral.positions == "all"
        clean = nodes.clean(batch, whole=whole, pad_token=self._pad)
        tokens = _tokens(clean.logits, wanted)
        states = [(at, alpha) for at in range(len(nodes.modules)) for alpha in self.points]
        scores, gradients = (nodes.all if whole else nodes.last)(clean, tokens, states)
        gradients = gradients.reshape(len(nodes.modules), len(self.points), *gradients.shape[1:])
        mean = torch.einsum("lkbd,k->bld", gradients, gradients.new_tensor(self.weights))
        if not self.integral.times_activation:
            return mean, scores
        spans = [output - start for output, start in zip(clean.outputs, clean.starts, strict=True)]
        return mean * torch.stack([(take(s, clean.last) if whole else s)[:, 0] for s in spans], dim=1), scores

    def _plain(self, batch: Batch, wanted: Tensor | None, some: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Does one run of the whole model for each point, by hooks on the modules: works on any model."""
        nodes = self.nodes
        mask = batch.attention_mask.to(device_of(nodes.model))
        last = last_columns(mask)
        with torch.no_grad():
            logits, outputs = _watched(nodes, batch, mask)
            tokens = _tokens(take(logits, last)[:, 0], wanted)
            starts = [torch.zeros_like(output) for output in outputs]
            if self._pad is not None:
                pads = Batch(torch.full_like(batch.input_ids, self._pad), batch.attention_mask)
                starts = _watched(nodes, pads, mask)[1]
        here = torch.arange(mask.shape[1], device=mask.device) == last
        values, scores = [], []
        for at in range(len(nodes.modules)) if some is None else some:
            output, start = outputs[at], starts[at]
            total = torch.zeros_like(output[:, 0])
            for alpha, weight in zip(self.points, self.weights, strict=True):
                path = start + alpha * (output - start)
                leaf = take(path, last).requires_grad_(True)
                base = output if self.integral.positions == "last" else path
                handle = nodes.modules[at].register_forward_hook(_replacing(base, here, leaf))
                with torch.enable_grad():
                    try:
                        logits = take(nodes.model(**arguments_of(batch, mask)).logits, last)[:, 0]
                    finally:
                        handle.remove()
                    scored = nodes.score(logits, tokens)
                    (gradient,) = torch.autograd.grad(scored.sum(), leaf)
                total += weight * gradient[:, 0]
                scores.append(scored.detach())
            values.append(total * take(output - start, last)[:, 0] if self.integral.times_activation else total)
        return torch.stack(values, dim=1), torch.stack(scores)

    def _try_fast(self, batch: Batch, wanted: Tensor | None) -> Tensor | None:
        """Attributes the first batch the fast way; compares one block of its most padded text with the plain way."""

        def gap(result: tuple[Tensor, Tensor]) -> float:
            values, scores = result
            row = int(batch.attention_mask.sum(dim=1).argmin())
            one = Batch(batch.input_ids[row : row + 1], batch.attention_mask[row : row + 1])
            at = (len(self.layers) - 1) // 2
            plain, levels = self._plain(one, None if wanted is None else wanted[row : row + 1], [at])
            fast = scores.reshape(len(self.layers), len(self.points), -1)[at, :, row]
            gaps = _gap(values[row, at], plain[0, 0]), _gap(fast, levels[:, 0])
            return max(gaps)

        # In half precision the order of a sum shows.
        tolerance = 1e-3 if torch.finfo(self.nodes.model.dtype).eps < 1e-4 else 0.2
        probe = "attribution: block and point"
        result = fast_or_none(self.nodes.model, lambda: self._fast(batch, wanted), gap, tolerance, probe)
        self.fits = result is not None
        return None if result is None else result[0]


def score(logits: Tensor, wanted: Tensor, target: Score) -> Tensor:
    """Computes F in float32 or better: of logits ``(..., vocabulary)`` and token ids ``(...)``, ``(...)``."""
    if target == "probability":
        return probabilities(logits, wanted)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.gather(-1, wanted[..., None]).squeeze(-1)


def _tokens(logits: Tensor, wanted: Tensor | None) -> Tensor:
    return logits.float().argmax(dim=-1) if wanted is None else wanted.to(logits.device)


def _gap(values: Tensor, wanted: Tensor) -> float:
    """Largest difference over the largest value; of values near zero, such as where F is near 1, rounding is all."""
    return float((values - wanted).abs().max() / wanted.abs().max().clamp_min(1e-2))


def _watched(nodes: ScaledNodes, batch: Batch, mask: Tensor) -> tuple[Tensor, list[Tensor]]:
    outputs: list[Tensor] = []
    with ExitStack() as stack:
        for module in nodes.modules:
            handle = module.register_forward_hook(
                lambda *seen: outputs.append(seen[2].reshape(*mask.shape, -1).float())
            )
            stack.callback(handle.remove)
        return cast(Tensor, nodes.model(**arguments_of(batch, mask)).logits), outputs


def _replacing(base: Tensor, here: Tensor, leaf: Tensor) -> Any:
    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return torch.where(here[..., None], leaf, base).to(output.dtype).reshape(output.shape)

    return hook
