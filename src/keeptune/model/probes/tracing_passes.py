"""Restored hidden states: where they are, and the exact way of running what they can change, all layers in one pass.

Causality: restoring position p changes positions p and later only. Whatever lies before them is that of the corrupted
run, whose keys and values are at hand. So the changed positions run alone, as *streams*: further rows of a batch, whose
queries see the corrupted run's keys and values as a prefix and their own as the rest. Streams of layer l enter above
block l, so that one pass serves all layers.

Nothing here names an architecture. The streams go through the model itself; a hook gives each block what it was given
in the corrupted run (mask, positions), cut to the streams' columns (:mod:`keeptune.model.probes.block_calls`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from keeptune.data.calibration import Batch
from keeptune.model.probes.block_calls import BlockCall, Blocks, KeptRun, Suffix, probabilities, take


@dataclass(frozen=True)
class TracedBatch:
    """A batch of prompts with their answers, the padding on either side.

    Args:
        batch: The tokens.
        mask: The attention mask, on the model's device.
        start: ``(B,)``, the column of the first token.
        prompts: ``(B,)``, tokens of the prompt, S.
        places: ``(B, T)``, the columns whose outputs predict the answer tokens; a shorter answer repeats its last.
        wanted: ``(B, T)``, the answer tokens.
        answered: ``(B, T)``, False for the repeats.
    """

    batch: Batch
    mask: Tensor
    start: Tensor
    prompts: Tensor
    places: Tensor
    wanted: Tensor
    answered: Tensor

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> TracedBatch:
        """Prepares a batch with a loss mask; each text has a prompt and an answer."""
        assert batch.loss_mask is not None
        mask = batch.attention_mask.to(device)
        start, lengths = mask.argmax(dim=1), mask.sum(dim=1)
        answers = batch.loss_mask.to(device).sum(dim=1)
        prompts = lengths - answers
        steps = torch.arange(int(answers.max()), device=device)[None]
        places = start[:, None] + prompts[:, None] - 1 + steps.minimum(answers[:, None] - 1)
        wanted = batch.input_ids.to(device).gather(1, places + 1)
        return cls(batch, mask, start, prompts, places, wanted, steps < answers[:, None])

    def __len__(self) -> int:
        return self.mask.shape[0]

    def answers(self, blocks: Blocks, run: KeptRun) -> Tensor:
        """Computes the probabilities of the answer tokens in a run, ``(B, T)``."""
        return probabilities(blocks.tail(take(run.inputs[-1], self.places)), self.wanted)


@dataclass
class Streams:
    """Streams of some columns, for all layers: that of a layer has its output restored.

    Args:
        clean: The clean run.
        noised: The corrupted run.
        columns: ``(B, Q)``, the columns that run; the same for all streams of a text.
        at: ``(n, B, Q)``, True where a state restores a column.
        alone: True when each column is a stream of its own, and sees no other of ``columns`` as restored; then it
            sees them as they are in the corrupted run. False when the columns are the end of a text and see each
            other.
    """

    blocks: Blocks
    texts: TracedBatch
    clean: KeptRun
    noised: KeptRun
    columns: Tensor
    at: Tensor
    alone: bool
    entered: int = 0

    def __post_init__(self) -> None:
        """Prepare the arguments of blocks."""
        self.suffix = Suffix(self.noised, self.texts.mask.shape[1], self.columns, alone=self.alone, times=0)

    def answers(self) -> Tensor:
        """Runs them.

        Returns:
            ``(layers, n, B, Q)`` where each column is alone: the probability of the token it predicts. Else
            ``(layers, n, B, T)``, the probabilities of the answer tokens.

        Raises:
            UnfitError: A block's arguments are not of the expected form.
        """
        texts, layers = self.texts, len(self.blocks.blocks)
        hidden = self._join(layers, self.blocks.run(self._enter))
        rows, wanted = len(hidden) // len(texts), texts.wanted
        if self.alone:
            wanted = texts.batch.input_ids.to(self.columns.device).gather(1, self.columns + 1)
        else:
            # A text whose answer lies before the columns has no state here: what it gives is not used.
            hidden = take(hidden, (texts.places - self.columns[:, :1]).clamp_min(0).repeat(rows, 1))
        answers = probabilities(self.blocks.tail(hidden), wanted.repeat(rows, 1))
        return answers.reshape(layers, len(self.at), len(texts), -1)

    def _join(self, number: int, hidden: Tensor) -> Tensor:
        """Adds the streams that enter before a block, which are those of the layer below it, to those before it."""
        rows = [hidden] if self.entered else []
        if number:
            clean, corrupted = (take(run.inputs[number], self.columns) for run in (self.clean, self.noised))
            rows.append(torch.where(self.at[..., None], clean, corrupted).flatten(0, 1))
            self.entered += 1
        self.suffix.times = self.entered * len(self.at)
        return torch.cat(rows) if rows else hidden

    def _enter(self, number: int, hidden: Tensor) -> BlockCall | None:
        joined = self._join(number, hidden)
        return self.suffix.call(number, joined) if self.entered else None
