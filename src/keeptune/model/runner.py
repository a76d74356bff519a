"""Runners pass batches through a model and hand over the rows of real tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from keeptune.core.offload import device_of
from keeptune.data.calibration import Batch
from keeptune.model.blocks import body, head_of
from keeptune.model.row_hooks import PassEnd as PassEnd
from keeptune.model.row_hooks import PassKind as PassKind
from keeptune.model.row_hooks import RealRows, watched
from keeptune.model.row_hooks import Sink as Sink
from keeptune.model.row_hooks import Taps as Taps
from keeptune.model.summed_loss import Loss, summed_loss

Done = Callable[[set[str]], None]


def no_done(_: set[str]) -> None:
    """What is done with finished modules by default."""


@dataclass(frozen=True)
class Runner:
    """Passes batches through a model in evaluation mode, with frozen weights and no caches.

    Padding never leaves a runner: a sink gets the rows of real tokens, one call per batch. An empty title shows no
    progress bar. ``done`` is called with the names of modules whose rows have all been handed over.
    """

    model: PreTrainedModel

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return device_of(self.model)

    def forward(
        self, batches: Sequence[Batch], sinks: Mapping[str, Sequence[Sink]], *, title: str, done: Done = no_done
    ) -> None:
        """Passes all batches once without the head; sinks get a module's input rows ``(tokens, in_features)``.

        The pass of a batch ends as soon as every watched module has been reached.

        Raises:
            StatisticsError: A row is NaN or infinite.
        """
        inner, taps = body(self.model), Taps(forward={name: list(own) for name, own in sinks.items()})
        with still(self.model), torch.no_grad():
            for number, batch in enumerate(_shown(batches, title), start=1):
                self._forth(inner, self._ready(batch), taps).check(f"batch {number} of {len(batches)}")
        done(set(sinks))

    def backward(self, batches: Sequence[Batch], taps: Taps, loss: Loss, *, title: str, done: Done = no_done) -> None:
        """Passes all batches forth once, and back once for each draw of the loss; only activations get gradients.

        The loss is the sum over the tokens to be learned (:func:`summed_loss`), so that gradients do not depend
        on what else is in a batch. Sinks of gradients are called once per draw.

        Raises:
            StatisticsError: A row is NaN or infinite, or the rows of texts are not known.
        """
        with still(self.model), torch.enable_grad():
            for number, batch in enumerate(_shown(batches, title), start=1):
                self._forth_and_back(self._ready(batch), taps, loss).check(f"batch {number} of {len(batches)}")
        done(taps.names)

    def _ready(self, batch: Batch) -> Batch:
        """Puts the padding behind the tokens for a classifier: an encoder's head reads the first of them."""
        if not head_of(self.model):
            return batch
        order = batch.attention_mask.argsort(dim=1, descending=True, stable=True)
        types = batch.token_type_ids
        return replace(
            batch,
            input_ids=batch.input_ids.gather(1, order),
            attention_mask=batch.attention_mask.gather(1, order),
            token_type_ids=None if types is None else types.gather(1, order),
        )

    def _forth(self, inner: nn.Module, batch: Batch, taps: Taps) -> RealRows:
        mask = batch.attention_mask.to(self.device)
        real = RealRows(mask)
        with suppress(PassEnd), watched(self.model, taps, taps.names, real, end=True):
            inner(**arguments_of(batch, mask))
        return real

    def _forth_and_back(self, batch: Batch, taps: Taps, loss: Loss) -> RealRows:
        mask = batch.attention_mask.to(self.device)
        real = RealRows(mask)

        def start(_: nn.Module, __: Any, output: Tensor) -> None:
            output.requires_grad_(True)  # weights are frozen; the graph begins at the embedding

        with ExitStack() as stack:
            stack.callback(self.model.get_input_embeddings().register_forward_hook(start).remove)
            stack.enter_context(watched(self.model, taps, taps.names, real))
            logits = self.model(**arguments_of(batch, mask)).logits
            for draw in range(loss.probes):
                last = draw + 1 == loss.probes
                torch.autograd.backward(summed_loss(logits, batch, loss, draw), retain_graph=not last)
        return real


@contextmanager
def still(model: PreTrainedModel) -> Iterator[None]:
    """Holds a model in evaluation mode with frozen weights, and restores its state."""
    training = model.training
    trainable = [p for p in model.parameters() if p.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for parameter in trainable:
            parameter.requires_grad_(True)


def _shown(batches: Sequence[Batch], title: str) -> Any:
    return tqdm(batches, desc=title, delay=2, disable=None if title else True, leave=False)


def arguments_of(batch: Batch, mask: Tensor) -> dict[str, Any]:
    """Returns the arguments of a model: positions count from the first real token, where padding stands in front."""
    arguments: dict[str, Any] = {"input_ids": batch.input_ids.to(mask.device), "attention_mask": mask}
    if batch.token_type_ids is not None:
        arguments["token_type_ids"] = batch.token_type_ids.to(mask.device)
    if not bool(mask[:, 0].all()):
        arguments["position_ids"] = (mask.cumsum(dim=1) - 1).clamp_min(0)
    return arguments | {"use_cache": False}
