"""The exact fast way of causal tracing: the hidden states that a restored one can change, all layers in one pass.

Causality: restoring position p changes positions p and later only. Whatever lies before them is that of the corrupted
run, whose keys and values are at hand. So the changed positions run alone, as *streams*: further rows of a batch, whose
queries see the corrupted run's keys and values as a prefix and their own as the rest. Streams of layer l enter above
block l, so that one pass serves all layers.

Nothing here names an architecture. The streams go through the model itself; a hook gives each block what it was given
in the corrupted run (mask, positions), cut to the streams' columns (:mod:`keeptune.model.probes.suffix`).
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from keeptune.model.probes.block_calls import first_argument, hidden_of, probabilities, take, with_hidden
from keeptune.model.probes.suffix import Suffix
from keeptune.model.probes.tracing_passes import RestoredModules, RunStates, TracedBatch


@dataclass
class Streams:
    """Streams of some columns, for all layers; the corrupted run has its cache.

    Args:
        columns: ``(B, Q)``, the columns that run; the same for all streams of a text.
        at: ``(n, B, Q)``, True where a state restores a column.
        alone: True when each column is a stream of its own, and sees no other of ``columns`` as restored; then it
            sees them as they are in the corrupted run. False when the columns are the end of a text and see each
            other.
    """

    modules: RestoredModules
    texts: TracedBatch
    clean: RunStates
    noised: RunStates
    columns: Tensor
    at: Tensor
    alone: bool
    entered: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Prepare the arguments of blocks."""
        assert self.noised.cache is not None
        self.suffix = Suffix(
            self.noised.calls, self.noised.cache, self.texts.width, self.columns, alone=self.alone, times=0
        )

    def answers(self) -> Tensor:
        """Runs them.

        Returns:
            ``(layers, n, B, Q)`` where each column is alone: the probability of the token it predicts. Else
            ``(layers, n, B, T)``, the probabilities of the answer tokens.

        Raises:
            UnfitError: A block's arguments are not of the expected form.
        """
        texts, blocks = self.texts, self.modules.blocks
        wanted = (
            texts.batch.input_ids.to(self.columns.device).gather(1, self.columns + 1) if self.alone else texts.wanted
        )
        with ExitStack() as stack:
            for number, block in enumerate(blocks):
                stack.callback(block.register_forward_pre_hook(self._before(number), with_kwargs=True).remove)
            if not self._block_outputs:
                for number, part in enumerate(self.modules.outputs):
                    stack.callback(part.register_forward_hook(self._restoring(number)).remove)
            stack.callback(blocks[-1].register_forward_hook(self._leave).remove)
            # What enters here runs below the first stream only; its form is that of what leaves.
            ids = texts.batch.input_ids.to(texts.mask.device)[:, : wanted.shape[1]]
            logits = self.modules.model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        answers = probabilities(logits, wanted.repeat(len(logits) // len(texts), 1))
        return answers.reshape(len(blocks), len(self.at), len(texts), -1)

    @property
    def _block_outputs(self) -> bool:
        return self.modules.outputs is self.modules.blocks

    def _entry(self, layer: int) -> int:
        """Returns the block before which a layer's streams enter: the first that sees or restores anything."""
        return layer + 1 if self._block_outputs else self.modules.restored(layer).start

    def _join(self, number: int, hidden: Tensor) -> Tensor | None:
        """Adds the streams that enter before a block to those before it; None while there are none."""
        new = [layer for layer in range(len(self.modules.blocks)) if self._entry(layer) == number]
        rows = [hidden] if self.entered else []
        corrupted = take(self.noised.inputs[number], self.columns)
        restored = take(self.clean.inputs[number], self.columns) if self._block_outputs else corrupted
        for _ in new:
            rows.append(torch.where(self.at[..., None], restored, corrupted).flatten(0, 1))
        self.entered += new
        self.suffix.times = len(self.entered) * len(self.at)
        return torch.cat(rows) if rows else None

    def _before(self, number: int) -> Any:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            joined = self._join(number, first_argument(block, args, kwargs))
            return None if joined is None else self.suffix.call(number, joined)

        return hook

    def _leave(self, _: nn.Module, __: Any, output: Any) -> Any:
        hidden = self._join(len(self.modules.blocks), hidden_of(output))
        assert hidden is not None
        if not self.alone:
            # A text whose answer lies before the columns has no state here: what it gives is not used.
            seen = (self.texts.places - self.columns[:, :1]).clamp_min(0)
            hidden = take(hidden, seen.repeat(len(hidden) // len(self.texts), 1))
        return with_hidden(output, hidden)

    def _restoring(self, number: int) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            if not self.entered:
                return None
            none = torch.zeros_like(self.at)
            chosen = [self.at if number in self.modules.restored(layer) else none for layer in self.entered]
            values = self.suffix.rows(take(self.clean.outputs[number], self.columns))
            return with_hidden(
                output, torch.where(torch.cat(chosen).flatten(0, 1)[..., None], values, hidden_of(output))
            )

        return hook
