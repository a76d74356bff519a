r"""Causal tracing of answers: which layers' hidden states bring a damaged prompt's answer back.

L2-LoRA (Zhang, Xie, Zhang, "Improving Low-Rank Adaptation with Layer-Specific Regularization", AAAI 2026), after ROME
(Meng et al., NeurIPS 2022). Some of the prompt's token embeddings get noise; then the clean run's hidden state is put
back at one position and layer:

    IE_l = Σ_t [ p(y_t | x_noise, v_(t,l)) - p(y_t | x_noise) ]                                              (2)

with every answer token y_t read from the given answer (teacher forcing). The paper's t is both the restored position
and the answer token, so that there are two readings:

A, ``diagonal``: restore the position whose output predicts y_t, and measure y_t. Literal, but the last layer gets all
of the clean run's probability back by definition, and the layers below it less: the profile rises with depth whatever
the model knows.

B, ``positions``: restore each position of the prompt, measure Σ_t p(y_t), and sum over positions: the heat map of the
paper's Fig. 2, summed up.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from keeptune.core.errors import RecipeError, StatisticsError
from keeptune.core.offload import device_of
from keeptune.data.calibration import Batch
from keeptune.model.probes.block_calls import fast_or_none
from keeptune.model.probes.tracing_passes import (
    OutputKind,
    RestoredModules,
    RunStates,
    TracedBatch,
    full_pass,
    plain_answers,
)
from keeptune.model.probes.tracing_streams import Streams
from keeptune.model.runner import still

Reading = Literal["diagonal", "positions"]


@dataclass(frozen=True, slots=True)
class Noise:
    """Which token embeddings are damaged, and how much.

    Args:
        fraction: Share of the prompt's tokens, at least one of them; the paper names none.
        scale: Standard deviation, in units of that of the model's token embeddings; ROME takes 3.
        seed: Each text has its own stream of random numbers, whatever batch it is in.
    """

    fraction: float = 0.5
    scale: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges."""
        if not 0 < self.fraction <= 1:
            raise RecipeError("noise", got=f"{self.fraction}", wanted="a share in (0, 1]", next_step="Try 0.5.")
        if not self.scale >= 0:
            raise RecipeError("noise scale", got=f"{self.scale}", wanted="0 or more", next_step="ROME takes 3.")

    def positions(self, tokens: Sequence[int], prompt: int) -> list[int]:
        """Draws the positions of the damaged tokens of a text with ``prompt`` tokens of prompt, in order."""
        count = max(1, round(self.fraction * prompt))
        order: list[int] = torch.randperm(prompt, generator=self._stream("positions", tokens)).tolist()
        return sorted(order[:count])

    def values(self, tokens: Sequence[int], prompt: int, hidden: int, std: float) -> Tensor:
        """Draws the noise of a text, ``(tokens, hidden)``, float32, for embeddings of standard deviation ``std``."""
        places = self.positions(tokens, prompt)
        noise = torch.zeros(len(tokens), hidden)
        noise[places] = torch.randn(len(places), hidden, generator=self._stream("values", tokens)) * (self.scale * std)
        return noise

    def _stream(self, what: str, tokens: Sequence[int]) -> torch.Generator:
        text = f"trace {what} {self.seed}:{list(tokens)}"
        return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big"))


@dataclass(frozen=True, slots=True, eq=False)
class Traced:
    """What was measured on one text, with a prompt of S tokens; K is T for reading A, S for reading B.

    Args:
        clean: ``(K,)``, ``p(y_t | x)``; for reading B its sum over t, at each position the same.
        corrupted: ``(K,)``, the same of the corrupted run.
        restored: ``(L, K)``, the same with a layer's output restored at one position.
    """

    tokens: tuple[int, ...]
    prompt: int
    clean: Tensor
    corrupted: Tensor
    restored: Tensor

    @property
    def heat(self) -> Tensor:
        """``(L, K)``, the indirect effect of each state."""
        return self.restored - self.corrupted

    @property
    def effect(self) -> Tensor:
        """``(L,)``, eq. 2."""
        return self.heat.sum(dim=1)


class Tracer:
    """Traces batches of texts with a causal language model.

    Args:
        kind: What is restored.
        window: Layers restored together, for attention and MLP outputs.
        chunk: Tokens in a pass with restored states; it changes speed and memory only.
        plain: Do one run per state even where the fast way applies.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        reading: Reading,
        kind: OutputKind = "block",
        window: int = 10,
        chunk: int = 2048,
        plain: bool = False,
    ) -> None:
        self.modules = RestoredModules.of(model, kind, window)
        self.reading = reading
        self.chunk = chunk
        # None: not tried yet.
        self.fits: bool | None = False if plain else None

    def trace(self, batch: Batch, noise: Tensor) -> list[Traced]:
        """Traces a batch with a loss mask; returns one result for each text, in the batch's order.

        Noise ``(B, W, hidden)`` is added to the token embeddings.

        Raises:
            StatisticsError: A probability is not finite, or the texts have no answers.
        """
        with still(self.modules.model), torch.no_grad():
            texts = TracedBatch.of(batch, device_of(self.modules.model))
            clean = full_pass(self.modules, texts)
            noised = full_pass(self.modules, texts, noise=noise, cached=self.fits is not False)
            restored = self._try_fast(texts, clean, noised, noise) if self.fits is None else None
            if restored is None:
                restored = (self._fast if self.fits else self._plain)(texts, clean, noised, noise)
        traced = [self._one(texts, row, clean, noised, restored) for row in range(len(texts))]
        if not all(bool(torch.isfinite(one.restored).all() & torch.isfinite(one.clean).all()) for one in traced):
            raise StatisticsError(
                "causal tracing",
                got="a probability that is NaN or infinite",
                wanted="finite numbers",
                next_step="Load the model in float32, or lower the noise.",
            )
        return traced

    def _one(self, texts: TracedBatch, row: int, clean: RunStates, noised: RunStates, restored: Tensor) -> Traced:
        tokens = tuple(texts.batch.input_ids[row][texts.batch.attention_mask[row].bool()].tolist())
        answered, S = texts.answered[row], int(texts.prompts[row])
        before, after, answers = clean.answers[row][answered], noised.answers[row][answered], restored[:, :, row]
        if self.reading == "diagonal":
            return Traced(tokens, S, before.cpu(), after.cpu(), answers[:, : len(before)].cpu())
        sums = answers[:, :S, answered].sum(dim=-1)
        return Traced(tokens, S, before.sum().expand(S).cpu(), after.sum().expand(S).cpu(), sums.cpu())

    def _columns(self, texts: TracedBatch) -> Tensor:
        """Returns the column of each position to restore, ``(K, B)``; -1 where a text is shorter."""
        if self.reading == "diagonal":
            return texts.places.T
        steps = torch.arange(int(texts.prompts.max()), device=texts.mask.device)[:, None]
        return torch.where(steps < texts.prompts, texts.start + steps, -1)

    def _fast(self, texts: TracedBatch, clean: RunStates, noised: RunStates, noise: Tensor) -> Tensor:
        """Returns ``(L, T, B)`` for reading A, ``(L, S, B, T)`` for reading B."""
        layers, columns = len(self.modules.blocks), self._columns(texts)
        if self.reading == "diagonal":
            size = max(1, self.chunk // (layers * len(texts)))
            parts = []
            for some in torch.split(columns.T, size, dim=1):
                at = torch.ones_like(some, dtype=torch.bool)[None]
                parts.append(Streams(self.modules, texts, clean, noised, some, at, alone=True).answers()[:, 0])
            return torch.cat(parts, dim=2).transpose(1, 2)
        # Before the first damaged token both runs are the same: nothing to restore.
        first = _first_damaged(texts, noise)
        parts = [noised.answers.expand(layers, first, -1, -1)]
        while first < len(columns):
            start = int(columns[first][columns[first] >= 0].min())
            own = torch.arange(start, texts.width, device=columns.device).expand(len(texts), -1)
            some = columns[first : first + max(1, self.chunk // (layers * own.numel()))]
            at = some[..., None] == own
            answers = Streams(self.modules, texts, clean, noised, own, at, alone=False).answers()
            parts.append(torch.where(some[..., None] >= 0, answers, noised.answers))
            first += len(some)
        return torch.cat(parts, dim=1)

    def _plain(self, texts: TracedBatch, clean: RunStates, noised: RunStates, noise: Tensor) -> Tensor:
        columns, layers = self._columns(texts), len(self.modules.blocks)
        states = [(layer, index) for layer in range(layers) for index in range(len(columns))]
        answers = self._runs(texts, clean, noise, columns, states).reshape(layers, len(columns), len(texts), -1)
        return answers.diagonal(dim1=1, dim2=3).transpose(1, 2) if self.reading == "diagonal" else answers

    def _runs(
        self, texts: TracedBatch, clean: RunStates, noise: Tensor, columns: Tensor, states: Sequence[tuple[int, int]]
    ) -> Tensor:
        every = torch.arange(texts.width, device=columns.device)
        at = every == columns[..., None]
        rows = max(1, self.chunk // texts.mask.numel())
        return plain_answers(self.modules, texts, clean, noise, [(layer, at[index]) for layer, index in states], rows)

    def _try_fast(self, texts: TracedBatch, clean: RunStates, noised: RunStates, noise: Tensor) -> Tensor | None:
        """Traces the first batch the fast way, and compares some of it with the plain way."""

        def gap(answers: Tensor) -> float:
            columns, layers = self._columns(texts), len(self.modules.blocks)
            states = [(0, max(len(columns) // 2, _first_damaged(texts, noise))), (layers // 2, len(columns) - 1)]
            states = [(layer, min(index, len(columns) - 1)) for layer, index in states]
            plain = self._runs(texts, clean, noise, columns, states)
            fast = torch.stack([answers[state] for state in states])
            if self.reading == "diagonal":
                plain = torch.stack([run[:, index] for run, (_, index) in zip(plain, states, strict=True)])
            return float((fast - plain).abs().max())

        # In half precision the order of a sum shows.
        tolerance = 1e-4 if torch.finfo(self.modules.model.dtype).eps < 1e-4 else 2e-2
        answers = fast_or_none(
            self.modules.model, lambda: self._fast(texts, clean, noised, noise), gap, tolerance, "trace: state"
        )
        self.fits = answers is not None
        if not self.fits:
            noised.cache = None
        return answers


def noise_of(noise: Noise, batch: Batch, model: PreTrainedModel, std: float) -> Tensor:
    """Draws the noise of a batch with a loss mask, ``(B, W, hidden)``, float32, on the model's device."""
    texts = TracedBatch.of(batch, torch.device("cpu"))
    embedding: Any = model.get_input_embeddings()
    values = torch.zeros(*batch.input_ids.shape, embedding.weight.shape[-1])
    for row, real in enumerate(texts.mask.bool()):
        tokens = batch.input_ids[row][real].tolist()
        values[row, real] = noise.values(tokens, int(texts.prompts[row]), values.shape[-1], std)
    return values.to(device_of(model))


def embedding_std(model: PreTrainedModel) -> float:
    """Computes the standard deviation of all entries of the token embeddings, as the model's first block gets them."""
    embedding: Any = model.get_input_embeddings()
    count, total, squares = 0, 0.0, 0.0
    with torch.no_grad():
        for ids in torch.split(torch.arange(embedding.weight.shape[0], device=device_of(model)), 8192):
            values = embedding(ids).double()
            count += values.numel()
            total += float(values.sum())
            squares += float((values**2).sum())
    return math.sqrt(max(squares / count - (total / count) ** 2, 0.0))


def _first_damaged(texts: TracedBatch, noise: Tensor) -> int:
    """Returns the first damaged position of any text; 0 where there is none."""
    damaged = noise.ne(0).any(dim=-1).to(texts.mask.device)
    return int((damaged.int().argmax(dim=1) - texts.start).clamp_min(0).min())
