"""ResidentRunner: passes batches through a model that fits in memory and hands over masked rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from keeptune.data.calibration import Batch
from keeptune.model.blocks import body

__all__ = ["ResidentRunner", "Sink"]

Sink = Callable[[Tensor], None]


class _Reached(Exception):
    """Every watched module has been reached: the rest of the pass is not needed."""


@dataclass(frozen=True)
class ResidentRunner:
    """Runs a model that is wholly in memory, without gradients, dropout, caches or its head.

    Padding never leaves the runner: a sink sees only the rows of real tokens.

    Args:
        model: The base model.
    """

    model: PreTrainedModel

    def forward(self, batches: Sequence[Batch], sinks: Mapping[str, Sequence[Sink]], *, title: str) -> None:
        """Pass all batches once; each sink gets the inputs of its module, one call per batch.

        The pass of a batch ends as soon as every watched module has been reached.

        Args:
            batches: Token batches.
            sinks: Module name to functions of its unpadded input rows, ``(tokens, in_features)``.
            title: What the progress bar says; empty for no bar.
        """
        inner = body(self.model)
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                for batch in tqdm(batches, desc=title, delay=2, disable=None if title else True, leave=False):
                    self._pass(inner, batch, sinks)
        finally:
            self.model.train(training)

    def _pass(self, inner: nn.Module, batch: Batch, sinks: Mapping[str, Sequence[Sink]]) -> None:
        mask = batch.attention_mask.to(self.model.device)
        rows = slice(None) if bool(mask.all()) else mask.reshape(-1).nonzero().squeeze(1)
        waiting = set(sinks)

        def hook_for(name: str, receivers: Sequence[Sink]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                found = inputs[0].reshape(-1, inputs[0].shape[-1])[rows]
                for receive in receivers:
                    receive(found)
                waiting.discard(name)
                if not waiting:
                    raise _Reached

            return hook

        with ExitStack() as stack:
            for name, receivers in sinks.items():
                handle = self.model.get_submodule(name).register_forward_pre_hook(hook_for(name, receivers))
                stack.callback(handle.remove)
            with suppress(_Reached):
                ids = batch.input_ids.to(self.model.device)
                inner(input_ids=ids, attention_mask=mask, use_cache=False, **_positions(mask))


def _positions(mask: Tensor) -> dict[str, Tensor]:
    """Count positions from the first real token where padding stands in front; models count it otherwise."""
    if bool(mask[:, 0].all()):
        return {}
    return {"position_ids": (mask.cumsum(dim=1) - 1).clamp_min(0)}
