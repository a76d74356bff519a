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

Restoring position p changes positions p and later only: they run alone, as *streams*, further rows of a batch whose
queries see the corrupted run's keys and values as a prefix and their own as the rest. Streams of layer l enter above
block l, so that one pass serves all layers.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from keeptune.core.errors import RecipeError, StatisticsError, need_finite
from keeptune.core.offload import device_of
from keeptune.core.options import Options, Range
from keeptune.data.calibration import Batch
from keeptune.model.blocks import blocks_of
from keeptune.model.probes.block_calls import BlockCall, Blocks, KeptRun, Suffix, probabilities, take
from keeptune.model.runner import still

Reading = Literal["diagonal", "positions"]


@dataclass(frozen=True)
class Noise(Options):
    """Which token embeddings are damaged, and how much.

    Args:
        fraction: Share of the prompt's tokens, at least one of them; the paper names none.
        scale: Standard deviation, in units of that of the model's token embeddings; ROME takes 3.
        seed: Each text has its own stream of random numbers, whatever batch it is in.
        given: Positions by the text's tokens, where none are drawn.
    """

    refusal = RecipeError
    ranges = {"fraction": Range(above=0, most=1, advice="Try 0.5."), "scale": Range(least=0, advice="ROME takes 3.")}

    fraction: float = 0.5
    scale: float = 3.0
    seed: int = 0
    given: Mapping[tuple[int, ...], Sequence[int]] = field(default_factory=dict)

    def positions(self, tokens: Sequence[int], prompt: int) -> list[int]:
        """Returns the positions of the damaged tokens of a text with ``prompt`` tokens of prompt, in order."""
        if tuple(tokens) in self.given:
            return sorted(set(self.given[tuple(tokens)]))
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
    """Traces batches of texts with a causal language model; ``chunk`` tokens in a pass with restored states."""

    def __init__(self, model: PreTrainedModel, *, reading: Reading, chunk: int = 2048) -> None:
        self.blocks = Blocks(model, blocks_of(model))
        self.reading = reading
        self.chunk = chunk
        self.checked = False

    def trace(self, batch: Batch, noise: Tensor) -> list[Traced]:
        """Traces a batch with a loss mask; returns one result for each text, in the batch's order.

        Noise ``(B, W, hidden)`` is added to the token embeddings.

        Raises:
            ModelError: The model's blocks cannot be run on some tokens alone.
            StatisticsError: A probability is not finite.
        """
        with still(self.blocks.model), torch.no_grad():
            texts = TracedBatch(batch, device_of(self.blocks.model))
            clean, noised = (self.blocks.keep(batch, (), noise=given) for given in (None, noise))
            before, after = (texts.answers(self.blocks, run) for run in (clean, noised))
            streams = partial(restored_answers, self.blocks, texts, clean, noised, alone=self.reading == "diagonal")
            if not self.checked:
                columns = texts.places[:, :2]
                if self.reading == "positions":
                    columns = _from(int(texts.places.min()), texts)
                nothing = torch.zeros_like(columns, dtype=torch.bool)[None]
                kept = after[:, : columns.shape[1]] if self.reading == "diagonal" else after
                self.blocks.check(
                    partial(streams, columns=columns, at=nothing),
                    kept.expand(len(self.blocks.blocks), 1, -1, -1),
                    "trace",
                )
                self.checked = True
            restored = (self._diagonal if self.reading == "diagonal" else self._positions)(texts, streams, after, noise)
        traced = [self._one(texts, row, before, after, restored) for row in range(len(texts))]
        for one in traced:
            need_finite(
                one.restored.isfinite() & one.clean.isfinite(), "causal tracing", "probabilities", StatisticsError
            )
        return traced

    def _one(self, texts: TracedBatch, row: int, clean: Tensor, noised: Tensor, restored: Tensor) -> Traced:
        tokens = tuple(texts.batch.input_ids[row][texts.batch.attention_mask[row].bool()].tolist())
        answered, S = texts.answered[row], int(texts.prompts[row])
        before, after, answers = clean[row][answered], noised[row][answered], restored[:, :, row]
        if self.reading == "diagonal":
            return Traced(tokens, S, before.cpu(), after.cpu(), answers[:, : len(before)].cpu())
        sums = answers[:, :S, answered].sum(dim=-1)
        return Traced(tokens, S, before.sum().expand(S).cpu(), after.sum().expand(S).cpu(), sums.cpu())

    def _diagonal(self, texts: TracedBatch, streams: partial[Tensor], *_: Tensor) -> Tensor:
        """Returns ``(L, T, B)``."""
        parts = []
        for some in torch.split(texts.places, max(1, self.chunk // (len(self.blocks.blocks) * len(texts))), dim=1):
            at = torch.ones_like(some, dtype=torch.bool)[None]
            parts.append(streams(columns=some, at=at)[:, 0])
        return torch.cat(parts, dim=2).transpose(1, 2)

    def _positions(self, texts: TracedBatch, streams: partial[Tensor], noised: Tensor, noise: Tensor) -> Tensor:
        """Returns ``(L, S, B, T)``."""
        layers, steps = len(self.blocks.blocks), torch.arange(int(texts.prompts.max()), device=texts.mask.device)
        # The column of each position; -1 where a text is shorter.
        columns = torch.where(steps[:, None] < texts.prompts, texts.start + steps[:, None], -1)
        # Before the first damaged token of any text both runs are the same: nothing to restore.
        damaged = noise.ne(0).any(dim=-1).to(texts.mask.device)
        first = int((damaged.int().argmax(dim=1) - texts.start).clamp_min(0).min())
        parts = [noised.expand(layers, first, -1, -1)]
        while first < len(columns):
            own = _from(int(columns[first][columns[first] >= 0].min()), texts)
            some = columns[first : first + max(1, self.chunk // (layers * own.numel()))]
            answers = streams(columns=own, at=some[..., None] == own)
            parts.append(torch.where(some[..., None] >= 0, answers, noised))
            first += len(some)
        return torch.cat(parts, dim=1)


def noise_of(noise: Noise, batch: Batch, model: PreTrainedModel, std: float) -> Tensor:
    """Draws the noise of a batch with a loss mask, ``(B, W, hidden)``, float32, on the model's device."""
    texts = TracedBatch(batch, torch.device("cpu"))
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


def _from(start: int, texts: TracedBatch) -> Tensor:
    """Returns the columns from one on, ``(B, Q)``."""
    return torch.arange(start, texts.mask.shape[1], device=texts.mask.device).expand(len(texts), -1)


class TracedBatch:
    """A batch of prompts with their answers, the padding on either side; it has a loss mask.

    Attributes:
        batch: The tokens.
        mask: The attention mask, on the model's device.
        start: ``(B,)``, the column of the first token.
        prompts: ``(B,)``, tokens of the prompt, S.
        places: ``(B, T)``, the columns whose outputs predict the answer tokens; a shorter answer repeats its last.
        wanted: ``(B, T)``, the answer tokens.
        answered: ``(B, T)``, False for the repeats.
    """

    def __init__(self, batch: Batch, device: torch.device) -> None:
        assert batch.loss_mask is not None
        self.batch, self.mask = batch, batch.attention_mask.to(device)
        self.start, lengths = self.mask.argmax(dim=1), self.mask.sum(dim=1)
        answers = batch.loss_mask.to(device).sum(dim=1)
        self.prompts = lengths - answers
        steps = torch.arange(int(answers.max()), device=device)[None]
        self.places = self.start[:, None] + self.prompts[:, None] - 1 + steps.minimum(answers[:, None] - 1)
        self.wanted = batch.input_ids.to(device).gather(1, self.places + 1)
        self.answered = steps < answers[:, None]

    def __len__(self) -> int:
        return self.mask.shape[0]

    def answers(self, blocks: Blocks, run: KeptRun) -> Tensor:
        """Computes the probabilities of the answer tokens in a run, ``(B, T)``."""
        return probabilities(blocks.tail(take(run.inputs[-1], self.places)), self.wanted)


def restored_answers(
    blocks: Blocks, texts: TracedBatch, clean: KeptRun, noised: KeptRun, columns: Tensor, at: Tensor, *, alone: bool
) -> Tensor:
    """Runs streams of some columns, for all layers: that of a layer has its output restored.

    Args:
        blocks: Of the model.
        texts: The batch.
        clean: The clean run.
        noised: The corrupted run.
        columns: ``(B, Q)``, the columns that run; the same for all streams of a text.
        at: ``(n, B, Q)``, True where a state restores a column.
        alone: True when each column is a stream of its own, and sees no other of ``columns`` as restored; then it
            sees them as they are in the corrupted run. False when the columns are the end of a text and see each
            other.

    Returns:
        ``(layers, n, B, Q)`` where each column is alone: the probability of the token it predicts. Else
        ``(layers, n, B, T)``, the probabilities of the answer tokens.

    Raises:
        UnfitError: A block's arguments are not of the expected form.
    """
    suffix = Suffix(noised, texts.mask.shape[1], columns, alone=alone, times=0)

    def join(number: int, hidden: Tensor) -> Tensor:
        """Adds the streams that enter before a block, which are those of the layer below it, to those before it."""
        rows = [hidden] if suffix.times else []
        if number:
            restored, corrupted = (take(run.inputs[number], columns) for run in (clean, noised))
            rows.append(torch.where(at[..., None], restored, corrupted).flatten(0, 1))
            suffix.times += len(at)
        return torch.cat(rows) if rows else hidden

    def enter(number: int, hidden: Tensor) -> BlockCall | None:
        joined = join(number, hidden)
        return suffix.call(number, joined) if suffix.times else None

    layers = len(blocks.blocks)
    hidden = join(layers, blocks.run(enter))
    rows, wanted = len(hidden) // len(texts), texts.wanted
    if alone:
        wanted = texts.batch.input_ids.to(columns.device).gather(1, columns + 1)
    else:
        # A text whose answer lies before the columns has no state here: what it gives is not used.
        hidden = take(hidden, (texts.places - columns[:, :1]).clamp_min(0).repeat(rows, 1))
    answers = probabilities(blocks.tail(hidden), wanted.repeat(rows, 1))
    return answers.reshape(layers, len(at), len(texts), -1)
