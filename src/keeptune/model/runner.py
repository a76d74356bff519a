"""ResidentRunner: passes batches through a model that fits in memory and hands over masked rows."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from keeptune.core.errors import StatisticsError
from keeptune.data.calibration import Batch
from keeptune.model.blocks import body, head_of, is_nested
from keeptune.model.head import sequence_losses

__all__ = [
    "Labels",
    "ResidentRunner",
    "Sink",
    "Taps",
    "arguments_of",
    "drawn_classes",
    "drawn_labels",
    "still",
    "summed_loss",
]

Sink = Callable[[Tensor], None]
Labels = Literal["true", "sampled"]


class _Reached(Exception):
    """Every watched module has been reached: the rest of the pass is not needed."""


@dataclass(frozen=True)
class Taps:
    """What receives the rows of a backward pass, by module name.

    Args:
        inputs: Get ``h``, ``(tokens, in_features)``.
        gradients: Get ``δ = d loss / d y``, ``(tokens, out_features)``.
        pairs: Get both at once.
        texts: Get both at once, and how many rows are of each text.
    """

    inputs: dict[str, list[Sink]] = field(default_factory=dict)
    gradients: dict[str, list[Sink]] = field(default_factory=dict)
    pairs: dict[str, list[Callable[[Tensor, Tensor], None]]] = field(default_factory=dict)
    texts: dict[str, list[Callable[[Tensor, Tensor, Sequence[int]], None]]] = field(default_factory=dict)

    @property
    def backward(self) -> set[str]:
        """The modules whose gradients are wanted."""
        return {*self.gradients, *self.pairs, *self.texts}


@dataclass(frozen=True)
class ResidentRunner:
    """Runs a model that is wholly in memory: in evaluation mode, with frozen weights and no caches.

    Padding never leaves the runner: a sink sees only the rows of real tokens.

    Args:
        model: The base model.
    """

    model: PreTrainedModel

    def forward(self, batches: Sequence[Batch], sinks: Mapping[str, Sequence[Sink]], *, title: str) -> None:
        """Pass all batches once without the head; each sink gets the inputs of its module, one call per batch.

        The pass of a batch ends as soon as every watched module has been reached.

        Args:
            batches: Token batches.
            sinks: Module name to functions of its unpadded input rows, ``(tokens, in_features)``.
            title: What the progress bar says; empty for no bar.
        """
        inner = body(self.model)
        with still(self.model), torch.no_grad():
            for number, batch in enumerate(_shown(batches, title), start=1):
                self._pass(inner, self._ready(batch), sinks).check(f"batch {number} of {len(batches)}")

    def backward(self, batches: Sequence[Batch], taps: Taps, *, labels: Labels, seed: int, title: str) -> None:
        """Pass all batches forth and back once; weights are frozen, so only activations get gradients.

        The loss is the sum over the tokens to be learned (:func:`summed_loss`), so that gradients do not depend
        on what else is in a batch.

        Args:
            batches: Token batches.
            taps: What receives inputs and gradients.
            labels: ``"true"`` takes the data's tokens (the empirical Fisher), ``"sampled"`` draws them from the
                model's own distribution (the Fisher itself).
            seed: Seed of the drawn labels.
            title: What the progress bar says; empty for no bar.
        """
        with still(self.model), torch.enable_grad():
            for number, batch in enumerate(_shown(batches, title), start=1):
                self._sweep(self._ready(batch), taps, labels, seed).check(f"batch {number} of {len(batches)}")

    def _ready(self, batch: Batch) -> Batch:
        """Put the padding behind the tokens for a classifier: an encoder's head reads the first of them."""
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

    def _pass(self, inner: nn.Module, batch: Batch, sinks: Mapping[str, Sequence[Sink]]) -> _Real:
        waiting = set(sinks)
        mask = batch.attention_mask.to(self.model.device)
        real = _Real(mask)

        def hook_for(name: str, receivers: Sequence[Sink]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                found = real.rows(inputs[0], name, "inputs")
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
                inner(**arguments_of(batch, mask))
        return real

    def _sweep(self, batch: Batch, taps: Taps, labels: Labels, seed: int) -> _Real:
        mask = batch.attention_mask.to(self.model.device)
        real = _Real(mask)

        def hook_for(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                h = real.rows(inputs[0].detach(), name, "inputs")
                for receive in taps.inputs.get(name, []):
                    receive(h)

                def arrived(gradient: Tensor) -> None:
                    delta = real.rows(gradient, name, "gradients")
                    for receive in taps.gradients.get(name, []):
                        receive(delta)
                    for receive_both in taps.pairs.get(name, []):
                        receive_both(h, delta)
                    for receive_texts in taps.texts.get(name, []):
                        receive_texts(h, delta, real.lengths(h, name))

                if name in taps.backward:
                    output.register_hook(arrived)  # type: ignore[no-untyped-call]

            return hook

        def start(_: nn.Module, __: Any, output: Tensor) -> None:
            output.requires_grad_(True)  # weights are frozen; the graph begins at the embedding

        with ExitStack() as stack:
            stack.callback(self.model.get_input_embeddings().register_forward_hook(start).remove)
            for name in {*taps.inputs, *taps.backward}:
                stack.callback(self.model.get_submodule(name).register_forward_hook(hook_for(name)).remove)
            logits = self.model(**arguments_of(batch, mask)).logits
            torch.autograd.backward(summed_loss(logits, batch, labels=labels, seed=seed))
        return real


def summed_loss(logits: Tensor, batch: Batch, *, labels: Labels, seed: int) -> Tensor:
    """Sum the cross-entropy over the tokens to be learned, in nats; of a classifier, the loss over the texts.

    Law: the loss of a batch is the sum of the losses of its texts, whatever the padding.

    Args:
        logits: ``(batch, length, vocabulary)``, or a classifier's ``(batch, labels)``.
        batch: Tokens, with a loss mask or with labels; without either, whole texts are learned but for their first
            token.
        labels: The data's tokens or drawn ones.
        seed: Seed of the drawn labels.

    Returns:
        A scalar.

    Raises:
        StatisticsError: The batch has no labels for a classifier.
    """
    if batch.labels is not None and logits.ndim == 2:
        wanted = batch.labels if labels == "true" else drawn_classes(logits, batch, seed)
        return sequence_losses(logits, wanted.to(logits.device)).sum()
    if logits.ndim == 2:
        raise StatisticsError(
            "statistics",
            got="texts without labels for a classifier, whose gradients are asked for",
            wanted="labels",
            next_step="Pass task data; of knowledge, take a form without gradients (keep: drift, laplace: delta-act).",
        )
    whole = batch.attention_mask if batch.loss_mask is None else batch.loss_mask
    # The first token of a text is never predicted.
    learned = whole[:, 1:].bool() & batch.attention_mask[:, :-1].bool()
    chosen = logits[:, :-1][learned.to(logits.device)].float()
    wanted = batch.input_ids[:, 1:][learned] if labels == "true" else drawn_labels(chosen, batch, learned, seed)
    return functional.cross_entropy(chosen, wanted.to(logits.device), reduction="sum")


def drawn_labels(logits: Tensor, batch: Batch, learned: Tensor, seed: int) -> Tensor:
    """Draw labels from the model's distribution; each text has its own stream, whatever batch it is in.

    Args:
        logits: ``(labels, vocabulary)``.
        batch: Where the texts are.
        learned: ``(batch, length - 1)``, True where a label is wanted.
        seed: The seed.

    Returns:
        ``(labels,)``.
    """
    streams = zip(_streams(batch, seed), learned, strict=True)
    parts = [torch.rand(int(wanted.sum()), generator=stream) for stream, wanted in streams]
    return _drawn(logits, torch.cat(parts))


def drawn_classes(logits: Tensor, batch: Batch, seed: int) -> Tensor:
    """Draw what a classifier might say of each text, from its own distribution.

    The squared error is, but for a constant, the negative log-density of a normal distribution of variance 1/2.

    Args:
        logits: ``(batch, labels)``; one column is a score.
        batch: Where the texts are.
        seed: The seed.

    Returns:
        ``(batch,)``, indices of labels or scores.
    """
    if logits.shape[-1] == 1:
        noise = torch.cat([torch.randn(1, generator=stream) for stream in _streams(batch, seed)])
        return logits.detach()[:, 0].float() + noise.to(logits.device) / math.sqrt(2)
    return _drawn(logits, torch.cat([torch.rand(1, generator=stream) for stream in _streams(batch, seed)]))


def _streams(batch: Batch, seed: int) -> Iterator[torch.Generator]:
    for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
        text = f"{seed}:{ids[mask.bool()].tolist()}"
        stream = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")
        yield torch.Generator().manual_seed(stream)


def _drawn(logits: Tensor, uniform: Tensor) -> Tensor:
    edges = logits.detach().double().softmax(dim=-1).cumsum(dim=-1)
    found = torch.searchsorted(edges, uniform.to(edges)[:, None]).squeeze(1)
    return found.clamp_max(logits.shape[-1] - 1)


class _Real:
    """The rows of a batch that are real tokens."""

    def __init__(self, mask: Tensor) -> None:
        self.count = mask.numel()
        self.texts: list[int] = mask.sum(dim=1).tolist()
        self.places = None if bool(mask.all()) else mask.reshape(-1).nonzero().squeeze(1)
        self.largest: dict[tuple[str, str], Tensor] = {}

    def rows(self, values: Tensor, name: str, what: str) -> Tensor:
        """Take them; a module that sees other rows (an expert) needs batches without padding."""
        found = self._taken(values.reshape(-1, values.shape[-1]), name)
        if found.numel():
            self.largest[name, what] = torch.linalg.vector_norm(found, torch.inf)
        return found

    def lengths(self, rows: Tensor, name: str) -> Sequence[int]:
        """Count the rows of each text; an expert sees some of them, in an order of its own."""
        if rows.shape[0] != sum(self.texts) or is_nested(name):
            raise StatisticsError(
                name,
                got=f"{rows.shape[0]} rows for texts of {sum(self.texts)} tokens",
                wanted="one row per token",
                next_step='Take the statistic per="token", or leave the module out of the targets.',
            )
        return self.texts

    def check(self, place: str) -> None:
        """Refuse rows that are not numbers; where they were first met is where they come from."""
        if not self.largest:
            return
        ok = torch.stack([value.float() for value in self.largest.values()]).isfinite().tolist()
        for (name, what), fine in zip(self.largest, ok, strict=True):
            if not fine:
                raise StatisticsError(
                    name,
                    got=f"NaN or infinite {what} in {place}",
                    wanted="finite ones",
                    next_step="Load the model in float32 or bfloat16 and check the weights of the modules before it.",
                )

    def _taken(self, found: Tensor, name: str) -> Tensor:
        if self.places is None:
            return found
        if found.shape[0] != self.count:
            raise StatisticsError(
                name,
                got=f"{found.shape[0]} rows for {self.count} tokens, some of them padding",
                wanted="one row per token, or batches without padding",
                next_step="Leave the module out of the targets, or collect with texts of one length per batch.",
            )
        return found[self.places]


@contextmanager
def still(model: PreTrainedModel) -> Iterator[None]:
    """Hold a model in evaluation mode with frozen weights, and give it back as it was.

    Args:
        model: The model.

    Yields:
        Nothing.
    """
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
    """Say what a model is called with: positions count from the first real token, where padding stands in front.

    Args:
        batch: Tokens.
        mask: Its attention mask, on the model's device.

    Returns:
        Keyword arguments of the model.
    """
    arguments: dict[str, Any] = {"input_ids": batch.input_ids.to(mask.device), "attention_mask": mask}
    if batch.token_type_ids is not None:
        arguments["token_type_ids"] = batch.token_type_ids.to(mask.device)
    if not bool(mask[:, 0].all()):
        arguments["position_ids"] = (mask.cumsum(dim=1) - 1).clamp_min(0)
    return arguments | {"use_cache": False}
