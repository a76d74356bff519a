"""Restored hidden states: where they are, and the exact way of running what they can change, all layers in one pass.

Causality: restoring position p changes positions p and later only. Whatever lies before them is that of the corrupted
run, whose keys and values are at hand. So the changed positions run alone, as *streams*: further rows of a batch, whose
queries see the corrupted run's keys and values as a prefix and their own as the rest. Streams of layer l enter above
block l, so that one pass serves all layers.

Nothing here names an architecture. The streams go through the model itself; a hook gives each block what it was given
in the corrupted run (mask, positions), cut to the streams' columns (:mod:`keeptune.model.probes.suffix`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from keeptune.core.errors import ModelError
from keeptune.data.calibration import Batch
from keeptune.model.blocks import blocks_of, parts_of
from keeptune.model.probes.block_calls import BlockCall, Blocks, KeptRun, hidden_of, probabilities, take, with_hidden
from keeptune.model.probes.suffix import Suffix

OutputKind = Literal["block", "attention", "mlp"]


@dataclass(frozen=True)
class RestoredModules(Blocks):
    """The modules whose outputs are restored: the blocks, or the attention or MLP of each.

    ``window`` neighbouring layers are restored together.
    """

    outputs: tuple[nn.Module, ...]
    window: int

    @classmethod
    def of(cls, model: PreTrainedModel, kind: OutputKind, window: int) -> RestoredModules:
        """Returns the modules of a causal language model; block outputs are always restored alone.

        Raises:
            ModelError: The blocks have no such part of their own.
        """
        blocks = blocks_of(model)
        if kind == "block":
            return cls(model, blocks, blocks, 1)
        parts = [parts_of(block) for block in blocks]
        if not all(kind in named for named in parts):
            raise ModelError(
                type(model).__name__,
                got=f"blocks without one module that is their {kind}",
                wanted="one in each block",
                next_step="Trace block outputs.",
            )
        return cls(model, blocks, tuple(named[kind] for named in parts), window)

    def restored(self, layer: int) -> range:
        """Returns the layers restored together, as ROME counts them: the window's extra layer lies below."""
        return range(max(0, layer - self.window // 2), min(len(self.blocks), layer - (-self.window // 2)))

    def answers(self, texts: TracedBatch, run: KeptRun) -> Tensor:
        """Computes the probabilities of the answer tokens in a run, ``(B, T)``."""
        return probabilities(self.tail(take(run.inputs[-1], texts.places)), texts.wanted)


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


@dataclass
class Streams:
    """Streams of some columns, for all layers.

    Args:
        clean: The clean run.
        noised: The corrupted run.
        columns: ``(B, Q)``, the columns that run; the same for all streams of a text.
        at: ``(n, B, Q)``, True where a state restores a column.
        alone: True when each column is a stream of its own, and sees no other of ``columns`` as restored; then it
            sees them as they are in the corrupted run. False when the columns are the end of a text and see each
            other.
    """

    modules: RestoredModules
    texts: TracedBatch
    clean: KeptRun
    noised: KeptRun
    columns: Tensor
    at: Tensor
    alone: bool
    entered: list[int] = field(default_factory=list)

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
        texts, modules = self.texts, self.modules
        parts = [] if self._block_outputs else list(enumerate(modules.outputs))
        hidden = modules.run(self._enter, [(part, self._restoring(number)) for number, part in parts])
        hidden = self._join(len(modules.blocks), hidden)
        rows, wanted = len(hidden) // len(texts), texts.wanted
        if self.alone:
            wanted = texts.batch.input_ids.to(self.columns.device).gather(1, self.columns + 1)
        else:
            # A text whose answer lies before the columns has no state here: what it gives is not used.
            hidden = take(hidden, (texts.places - self.columns[:, :1]).clamp_min(0).repeat(rows, 1))
        answers = probabilities(modules.tail(hidden), wanted.repeat(rows, 1))
        return answers.reshape(len(modules.blocks), len(self.at), len(texts), -1)

    @property
    def _block_outputs(self) -> bool:
        return self.modules.outputs is self.modules.blocks

    def _entry(self, layer: int) -> int:
        """Returns the block before which a layer's streams enter: the first that sees or restores anything."""
        return layer + 1 if self._block_outputs else self.modules.restored(layer).start

    def _join(self, number: int, hidden: Tensor) -> Tensor:
        """Adds the streams that enter before a block to those before it."""
        new = [layer for layer in range(len(self.modules.blocks)) if self._entry(layer) == number]
        rows = [hidden] if self.entered else []
        corrupted = take(self.noised.inputs[number], self.columns)
        restored = take(self.clean.inputs[number], self.columns) if self._block_outputs else corrupted
        rows += [torch.where(self.at[..., None], restored, corrupted).flatten(0, 1)] * len(new)
        self.entered += new
        self.suffix.times = len(self.entered) * len(self.at)
        return torch.cat(rows) if rows else hidden

    def _enter(self, number: int, hidden: Tensor) -> BlockCall | None:
        joined = self._join(number, hidden)
        return self.suffix.call(number, joined) if self.entered else None

    def _restoring(self, number: int) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            if not self.entered:
                return None
            none = torch.zeros_like(self.at)
            chosen = [self.at if number in self.modules.restored(layer) else none for layer in self.entered]
            values = self.suffix.rows(take(self.clean.outputs[number], self.columns))
            given = hidden_of(output)
            here = torch.cat(chosen).flatten(0, 1)[..., None]
            return with_hidden(output, torch.where(here, values, given.reshape(values.shape)).reshape(given.shape))

        return hook
