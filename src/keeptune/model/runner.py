"""Runners pass batches through a model and hand over the rows of real tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from keeptune.core.errors import StatisticsError
from keeptune.core.offload import device_of
from keeptune.data.calibration import Batch
from keeptune.model.blocks import body, head_of, is_nested
from keeptune.model.expert_taps import expert_names, watched_experts
from keeptune.model.summed_loss import Loss, summed_loss

# What a sink gets of a module: inputs h (tokens, n), output gradients δ = d loss / d y (tokens, m), both at once, or
# both and the number of rows of each text.
PassKind = Literal["forward", "backward", "joint", "texts"]
Sink = Callable[..., None]
_Sinks = dict[str, list[Sink]]


class PassEnd(Exception):
    """All that was wanted of a pass is there: its rest is not needed."""


@dataclass(frozen=True)
class Taps:
    """The sinks of a backward pass, by the kind of what they get and the module's name."""

    forward: _Sinks = field(default_factory=dict)
    backward: _Sinks = field(default_factory=dict)
    joint: _Sinks = field(default_factory=dict)
    texts: _Sinks = field(default_factory=dict)

    def sinks(self, kind: PassKind) -> _Sinks:
        """Returns the sinks of one kind."""
        sinks: _Sinks = getattr(self, kind)
        return sinks

    @property
    def with_gradients(self) -> set[str]:
        """The modules whose gradients are wanted."""
        return {*self.backward, *self.joint, *self.texts}


@dataclass(frozen=True)
class Runner:
    """Passes batches through a model in evaluation mode, with frozen weights and no caches.

    Padding never leaves a runner: a sink gets the rows of real tokens, one call per batch. An empty title shows no
    progress bar.
    """

    model: PreTrainedModel

    def forward(self, batches: Sequence[Batch], sinks: Mapping[str, Sequence[Sink]], *, title: str) -> None:
        """Passes all batches once without the head; sinks get a module's input rows ``(tokens, in_features)``.

        The pass of a batch ends as soon as every watched module has been reached.

        Raises:
            StatisticsError: A row is NaN or infinite.
        """
        inner = body(self.model)
        with still(self.model), torch.no_grad():
            for number, batch in enumerate(_shown(batches, title), start=1):
                self._forth(inner, self._ready(batch), sinks).check(f"batch {number} of {len(batches)}")

    def backward(self, batches: Sequence[Batch], taps: Taps, loss: Loss, *, title: str) -> None:
        """Passes all batches forth once, and back once for each draw of the loss; only activations get gradients.

        The loss is the sum over the tokens to be learned (:func:`summed_loss`), so that gradients do not depend
        on what else is in a batch. Sinks of gradients are called once per draw.

        Raises:
            StatisticsError: A row is NaN or infinite, or the rows of texts are not known.
        """
        with still(self.model), torch.enable_grad():
            for number, batch in enumerate(_shown(batches, title), start=1):
                self._forth_and_back(self._ready(batch), taps, loss).check(f"batch {number} of {len(batches)}")

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

    def _forth(self, inner: nn.Module, batch: Batch, sinks: Mapping[str, Sequence[Sink]]) -> _RealRows:
        waiting = set(sinks)
        mask = batch.attention_mask.to(device_of(self.model))
        real = _RealRows(mask)

        def passed(name: str) -> None:
            waiting.discard(name)
            if not waiting:
                raise PassEnd

        def reached(name: str, inputs: Tensor, _: object = None) -> None:
            rows = real.rows(inputs, name, "inputs")
            for sink in sinks[name]:
                sink(rows)

        def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                reached(name, inputs[0])
                passed(name)

            return hook

        experts = expert_names(self.model, sinks)
        with ExitStack() as stack:
            stack.enter_context(watched_experts(self.model, experts, reached, passed))
            for name in [name for name in sinks if name not in experts]:
                stack.callback(self.model.get_submodule(name).register_forward_pre_hook(watch(name)).remove)
            with suppress(PassEnd):
                inner(**arguments_of(batch, mask))
        return real

    def _forth_and_back(self, batch: Batch, taps: Taps, loss: Loss) -> _RealRows:
        mask = batch.attention_mask.to(device_of(self.model))
        real = _RealRows(mask)

        def reached(name: str, inputs: Tensor, output: Tensor) -> None:
            h = real.rows(inputs.detach(), name, "inputs")
            for sink in taps.forward.get(name, []):
                sink(h)

            def arrived(gradient: Tensor) -> None:
                delta = real.rows(gradient, name, "gradients")
                for sink in taps.backward.get(name, []):
                    sink(delta)
                for sink in taps.joint.get(name, []):
                    sink(h, delta)
                for sink in taps.texts.get(name, []):
                    sink(h, delta, real.lengths(h, name))

            if name in taps.with_gradients:
                output.register_hook(arrived)  # type: ignore[no-untyped-call]

        def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                reached(name, inputs[0], output)

            return hook

        def start(_: nn.Module, __: Any, output: Tensor) -> None:
            output.requires_grad_(True)  # weights are frozen; the graph begins at the embedding

        names = {*taps.forward, *taps.with_gradients}
        experts = expert_names(self.model, names)
        with ExitStack() as stack:
            stack.callback(self.model.get_input_embeddings().register_forward_hook(start).remove)
            stack.enter_context(watched_experts(self.model, experts, reached, lambda _: None))
            for name in names - experts:
                stack.callback(self.model.get_submodule(name).register_forward_hook(watch(name)).remove)
            logits = self.model(**arguments_of(batch, mask)).logits
            for draw in range(loss.probes):
                last = draw + 1 == loss.probes
                torch.autograd.backward(summed_loss(logits, batch, loss, draw), retain_graph=not last)
        return real


class _RealRows:
    """The rows of a batch that are real tokens."""

    def __init__(self, mask: Tensor) -> None:
        self.count = mask.numel()
        self.texts: list[int] = mask.sum(dim=1).tolist()
        self.places = None if bool(mask.all()) else mask.reshape(-1).nonzero().squeeze(1)
        self.largest: dict[tuple[str, str], Tensor] = {}

    def rows(self, values: Tensor, name: str, what: str) -> Tensor:
        """Takes them; a module that sees other rows (an expert) needs batches without padding."""
        rows = self._taken(values.reshape(-1, values.shape[-1]), name)
        if rows.numel():
            self.largest[name, what] = torch.linalg.vector_norm(rows, torch.inf)
        return rows

    def lengths(self, rows: Tensor, name: str) -> Sequence[int]:
        """Counts the rows of each text; an expert sees some of them, in an order of its own."""
        if rows.shape[0] != sum(self.texts) or is_nested(name):
            raise StatisticsError(
                name,
                got=f"{rows.shape[0]} rows for texts of {sum(self.texts)} tokens",
                wanted="one row per token",
                next_step='Take the statistic per="token", or leave the module out of the targets.',
            )
        return self.texts

    def check(self, place: str) -> None:
        """Refuses rows that are not numbers; the first module that has them is where they come from."""
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

    def _taken(self, rows: Tensor, name: str) -> Tensor:
        if self.places is None:
            return rows
        if rows.shape[0] != self.count:
            raise StatisticsError(
                name,
                got=f"{rows.shape[0]} rows for {self.count} tokens, some of them padding",
                wanted="one row per token, or batches without padding",
                next_step="Leave the module out of the targets, or collect with texts of one length per batch.",
            )
        return rows[self.places]


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
