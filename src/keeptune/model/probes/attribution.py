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

Only what a scaled output can change is run again. The output of a down-projection at the last token changes the last
token's stream only. So for ``last``, one clean run keeps keys and values; then each (block, point of its path) is one
token that enters its block beside those of the blocks below, sees the kept keys and values as a prefix and its own as
the rest, and one backward pass serves all blocks. For ``all``, a block's scaled outputs change what all tokens see
above it: the text is run again from the block's kept input, without a graph, for its keys and values; the last token's
stream, which is all that the gradient passes through, then runs with a graph.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from keeptune.core.errors import ModelError, RecipeError, StatisticsError, need_finite
from keeptune.core.offload import device_of
from keeptune.core.options import Options, Range
from keeptune.data.calibration import Batch
from keeptune.model.blocks import blocks_of, down_projections, head_of
from keeptune.model.probes.block_calls import BlockCall, Blocks, KeptRun, Suffix, probabilities, take
from keeptune.model.runner import still

Positions = Literal["last", "all"]
Baseline = Literal["zero", "pad"]
Score = Literal["probability", "logit"]
Rule = Literal["left", "right", "trapezoid", "gauss-legendre"]


@dataclass(frozen=True)
class Integral(Options):
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

    section, refusal = "attribution.", RecipeError
    ranges = {"steps": Range(least=1), "pad_token": Range(least=0)}

    positions: Positions = "last"
    baseline: Baseline = "zero"
    pad_token: int = 0
    target: Score = "probability"
    rule: Rule = "left"
    steps: int = 7
    times_activation: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.need(self.rule != "trapezoid" or self.steps > 1, "steps", "2 or more with rule trapezoid")


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


@dataclass
class _Clean:
    """Texts as they are, of the last token or of all: its column ``(B, 1)``, and where the paths start."""

    mask: Tensor
    last: Tensor
    run: KeptRun
    starts: list[Tensor]

    def path(self, at: int, alpha: float) -> Tensor:
        """Returns a point of a down-projection's path, ``(B, C, D)``, float32."""
        start = self.starts[at].float()
        return start + alpha * (self.run.outputs[at].float() - start)

    def at_last(self, values: Tensor) -> Tensor:
        """Returns what belongs to the last token of ``(B, C, ...)``, ``(B, 1, ...)``."""
        return take(values, self.last) if values.shape[1] == self.mask.shape[1] else values


class Attributor:
    """Attributes batches of texts, with a causal language model without adapters; ``chunk`` tokens in a pass."""

    def __init__(self, model: PreTrainedModel, integral: Integral, *, chunk: int = 2048) -> None:
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
        self.blocks = Blocks(model, blocks_of(model))
        self.modules = tuple(model.get_submodule(target.name) for target in self.targets)
        self.layers = tuple(target.layer for target in self.targets)
        self.chunk = chunk
        self.checked = False

    def attribute(self, batch: Batch, wanted: Tensor | None = None) -> Tensor:
        """Attributes the token after the last one of each text: ``(B, layers, nodes)``, signed, float32, on the CPU.

        Args:
            batch: Texts, the padding on either side.
            wanted: ``(B,)``, the token ids to score; None for the model's own most likely ones.

        Raises:
            ModelError: The model's blocks cannot be run on the last token alone.
            StatisticsError: An attribution is not finite.
        """
        with still(self.blocks.model):
            clean = self._clean(batch)
            with torch.no_grad():
                logits = self.blocks.tail(clean.at_last(clean.run.inputs[-1]))[:, 0]
            tokens = logits.float().argmax(dim=-1) if wanted is None else wanted.to(logits.device)
            if not self.checked:
                # At the end of its path nothing is changed.
                middle, ends = [(len(self.modules) - 1) // 2], (1.0, 1.0)
                kept = score(logits, tokens, self.integral.target).expand(2, -1)
                self.blocks.check(lambda: self._gradients(clean, tokens, middle, ends)[0], kept, "attribution")
                self.checked = True
            every = range(len(self.modules))
            _, gradients = self._gradients(clean, tokens, every, self.points)
            gradients = gradients.reshape(len(every), len(self.points), *gradients.shape[1:])
            values = torch.einsum("lkbd,k->bld", gradients, gradients.new_tensor(self.weights))
            if self.integral.times_activation:
                spans = [clean.run.outputs[at].float() - clean.starts[at].float() for at in every]
                values = values * torch.cat([clean.at_last(span) for span in spans], dim=1)
        need_finite(values.isfinite(), "attribution", "numbers", StatisticsError)
        return values.cpu()

    def _clean(self, batch: Batch) -> _Clean:
        """Runs texts as they are, without the head."""
        mask = batch.attention_mask.to(device_of(self.blocks.model))
        steps = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        last = (mask * steps).argmax(dim=1, keepdim=True)

        def cut(values: Tensor) -> Tensor:
            return values if self.integral.positions == "all" else take(values, last)

        run = self.blocks.keep(batch, self.modules, cut)
        if self.integral.baseline == "zero":
            return _Clean(mask, last, run, [torch.zeros_like(output) for output in run.outputs])
        pads = Batch(torch.full_like(batch.input_ids, self.integral.pad_token), batch.attention_mask)
        return _Clean(mask, last, run, self.blocks.keep(pads, self.modules, cut).outputs)

    def _gradients(
        self, clean: _Clean, tokens: Tensor, ats: Sequence[int], points: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """Scores tokens at points of paths, ``(states, B)``, with gradients in scaled outputs, ``(states, B, D)``."""
        parts = []
        for leaves, cache in self._leaves(clean, ats, points):
            for part in self._streams(clean, leaves, cache, tokens):
                # Rows are texts within points.
                split = part.reshape(-1, len(tokens), *part.shape[1:])
                parts.append(split.transpose(1, 2).flatten(0, 1))
        return torch.cat(parts[::2]), torch.cat(parts[1::2])

    def _leaves(
        self, clean: _Clean, ats: Sequence[int], points: Sequence[float]
    ) -> Iterator[tuple[dict[int, Tensor], DynamicCache]]:
        """Yields scaled outputs of the last token, ``(rows, n, D)`` each, and the keys and values that they see."""
        if self.integral.positions == "last":
            states = [(at, alpha) for at in ats for alpha in points]
            for some in _batched(states, self.chunk // 4 // len(clean.mask)):
                scaled = {at: [clean.path(at, alpha) for other, alpha in some if other == at] for at in dict(some)}
                yield {at: torch.cat(paths, dim=1) for at, paths in scaled.items()}, clean.run.cache
            return
        for at in ats:
            for some in _batched(points, self.chunk // clean.mask.numel()):
                path = torch.cat([clean.path(at, alpha) for alpha in some])
                yield {at: take(path, clean.last.repeat(len(some), 1))}, self._above(clean, at, path, len(some))

    def _above(self, clean: _Clean, at: int, path: Tensor, times: int) -> DynamicCache:
        """Runs texts from a block on with its output scaled at all tokens, for their keys and values."""
        width, layer, store = clean.mask.shape[1], self.layers[at], DynamicCache()
        if layer == len(self.blocks.blocks) - 1:
            return clean.run.cache
        columns = torch.arange(width, device=clean.mask.device).expand(len(clean.mask), -1)
        suffix = Suffix(clean.run, width, columns, alone=False, times=times)

        def enter(number: int, hidden: Tensor) -> BlockCall | None:
            if number < layer:
                return None
            return suffix.call(number, suffix.rows(clean.run.inputs[number]) if number == layer else hidden, store)

        def scaled(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            return path.to(output).reshape(output.shape)

        with torch.no_grad():
            self.blocks.run(enter, [(self.modules[at], scaled)])
        return store

    def _streams(
        self, clean: _Clean, leaves: dict[int, Tensor], cache: DynamicCache, tokens: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Runs the last tokens' streams, entering with leaves ``(rows, n, D)``, and goes back through them."""
        ready = {at: leaf.detach().requires_grad_(True) for at, leaf in leaves.items()}
        entering = {self.layers[at]: leaf.shape[1] for at, leaf in ready.items()}
        times = len(next(iter(ready.values()))) // len(tokens)
        count = 0

        def enter(number: int, hidden: Tensor) -> BlockCall | None:
            nonlocal count
            rows, new = [hidden] if count else [], entering.get(number, 0)
            if new:
                rows.append(clean.at_last(clean.run.inputs[number]).repeat(times, 1, 1).expand(-1, new, -1))
            count += new
            if not count:
                return None
            columns = clean.last.expand(-1, count)
            suffix = Suffix(clean.run, clean.mask.shape[1], columns, alone=True, times=times, cache=cache)
            return suffix.call(number, torch.cat(rows, dim=1))

        def scaling(leaf: Tensor) -> Any:
            def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
                there = output.reshape(len(leaf), count, -1)[:, : count - leaf.shape[1]]
                return torch.cat([there, leaf.to(output)], dim=1).reshape(output.shape)

            return hook

        with torch.enable_grad():
            final = self.blocks.run(enter, [(self.modules[at], scaling(leaf)) for at, leaf in ready.items()])
        scores, slopes, sizes = self._scored(final, tokens.repeat(times))
        gradients = torch.autograd.grad(final, list(ready.values()), slopes)
        return scores, torch.cat(gradients, dim=1) * sizes[..., None]

    def _scored(self, hidden: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores the last block's output ``(rows, n, hidden)``, a slice at a time; gradients are over powers of two."""
        flat = hidden.detach().flatten(0, 1)[:, None]
        tokens = wanted[:, None].expand(hidden.shape[:2]).flatten()
        vocabulary = self.blocks.model.config.get_text_config().vocab_size
        size = max(1, self.chunk * flat.shape[-1] // vocabulary)
        parts = []
        for first in range(0, len(flat), size):
            some = flat[first : first + size].requires_grad_(True)
            with torch.enable_grad():
                logits = self.blocks.tail(some)[:, 0]
                leaf = logits.detach().float().requires_grad_(True)
                scored = score(leaf, tokens[first : first + size], self.integral.target)
            (slope,) = torch.autograd.grad(scored.sum(), leaf)
            # A probability near 0 or 1 has gradients that float16 would take for zero.
            power = torch.exp2(slope.abs().amax(dim=-1).clamp_min(1e-30).log2().round())
            (back,) = torch.autograd.grad(logits, some, (slope / power[:, None]).to(logits))
            parts.append((scored.detach(), back[:, 0], power))
        scores, slopes, powers = (torch.cat(part) for part in zip(*parts, strict=True))
        form = hidden.shape[:2]
        return scores.reshape(form), slopes.reshape(hidden.shape), powers.reshape(form)


def score(logits: Tensor, wanted: Tensor, target: Score) -> Tensor:
    """Computes F in float32 or better: of logits ``(..., vocabulary)`` and token ids ``(...)``, ``(...)``."""
    if target == "probability":
        return probabilities(logits, wanted)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.gather(-1, wanted[..., None]).squeeze(-1)


def _batched(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for first in range(0, len(items), max(1, size)):
        yield items[first : first + max(1, size)]
