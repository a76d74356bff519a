"""Runners pass batches through a model and hand over the rows of real tokens, and the gradients that come back."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from keeptune.core.errors import StatisticsError, need_finite
from keeptune.core.eval_mode import in_evaluation
from keeptune.core.offload import device_of
from keeptune.data.calibration import Batch
from keeptune.model.blocks import body, head_of, is_nested
from keeptune.model.fused_experts import expert_names, watched_experts
from keeptune.model.head import Loss, summed_loss

Sink = Callable[..., None]
_Sinks = dict[str, list[Sink]]


class PassEnd(Exception):
    """All that was wanted of a pass is there: its rest is not needed."""


@dataclass(frozen=True)
class Taps:
    """The sinks of a pass, by the module's name.

    Args:
        inputs: Get input rows h, ``(tokens, n)``.
        gradients: Get h, the rows of output gradients δ = d loss / d y, ``(tokens, m)``, and a function that counts the
            rows of each text.
    """

    inputs: _Sinks = field(default_factory=dict)
    gradients: _Sinks = field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        """All modules that are watched."""
        return {*self.inputs, *self.gradients}


class RealRows:
    """The rows of a batch that are real tokens."""

    def __init__(self, mask: Tensor) -> None:
        self.count = mask.numel()
        self.texts: list[int] = mask.sum(dim=1).tolist()
        self.places = None if bool(mask.all()) else mask.reshape(-1).nonzero().squeeze(1)
        self.largest: dict[tuple[str, str], Tensor] = {}

    def rows(self, values: Tensor, name: str, what: str) -> Tensor:
        """Takes them; a module that sees other rows (an expert) needs batches without padding."""
        rows = values.reshape(-1, values.shape[-1])
        if self.places is not None and rows.shape[0] != self.count:
            raise StatisticsError(
                name,
                got=f"{rows.shape[0]} rows for {self.count} tokens, some of them padding",
                wanted="one row per token, or batches without padding",
                next_step="Leave the module out of the targets, or collect with texts of one length per batch.",
            )
        rows = rows if self.places is None else rows[self.places]
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
        ok = torch.stack([value.float() for value in self.largest.values()]).isfinite().cpu()
        for (name, what), fine in zip(self.largest, ok, strict=True):
            need_finite(fine, name, f"{what} in {place}", StatisticsError)


@contextmanager
def watched(
    model: PreTrainedModel, taps: Taps, names: set[str], real: RealRows, *, end: bool = False
) -> Iterator[None]:
    """Hands the input rows and output gradients of modules to sinks; ``end`` raises PassEnd once all were reached."""
    waiting = set(names)

    def passed(name: str) -> None:
        waiting.discard(name)
        if end and not waiting:
            raise PassEnd

    def reached(name: str, inputs: Tensor, output: Tensor | None = None) -> None:
        h = real.rows(inputs.detach(), name, "inputs")
        for sink in taps.inputs.get(name, []):
            sink(h)

        def arrived(gradient: Tensor) -> None:
            delta = real.rows(gradient, name, "gradients")
            for sink in taps.gradients[name]:
                sink(h, delta, partial(real.lengths, h, name))

        if output is not None and name in taps.gradients:
            output.register_hook(arrived)  # type: ignore[no-untyped-call]

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | None = None) -> None:
            reached(name, inputs[0], output)
            passed(name)

        return hook

    experts = expert_names(model, names)
    with ExitStack() as stack:
        stack.enter_context(watched_experts(model, experts, reached, passed))
        for name in names - experts:
            module = model.get_submodule(name)
            # Where inputs are enough, a pass that ends there need not compute the module.
            add = module.register_forward_hook if name in taps.gradients else module.register_forward_pre_hook
            stack.callback(add(watch(name)).remove)
        yield


Done = Callable[[set[str]], None]


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

    def run(
        self, batches: Sequence[Batch], taps: Taps, loss: Loss | None = None, *, title: str, done: Done = lambda _: None
    ) -> None:
        """Passes all batches once forth, and once back for each draw of a loss; only activations get gradients.

        Without a loss the head does not run, and the pass of a batch ends as soon as every watched module has been
        reached. The loss is the sum over the tokens to be learned (:func:`summed_loss`), so that gradients do not
        depend on what else is in a batch. Sinks of gradients are called once per draw.

        Raises:
            StatisticsError: A row is NaN or infinite, or the rows of texts are not known.
        """
        shown = tqdm(batches, desc=title, delay=2, disable=None if title else True, leave=False)
        with still(self.model), torch.set_grad_enabled(loss is not None):
            for number, batch in enumerate(map(self._ready, shown), start=1):
                mask = batch.attention_mask.to(self.device)
                real = RealRows(mask)
                if loss is None:
                    with suppress(PassEnd), watched(self.model, taps, taps.names, real, end=True):
                        body(self.model)(**arguments_of(batch, mask))
                else:
                    self._forth_and_back(batch, taps, loss, real)
                real.check(f"batch {number} of {len(batches)}")
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

    def _forth_and_back(self, batch: Batch, taps: Taps, loss: Loss, real: RealRows) -> None:
        mask = batch.attention_mask.to(self.device)

        def start(_: nn.Module, __: Any, output: Tensor) -> None:
            output.requires_grad_(True)  # weights are frozen; the graph begins at the embedding

        with ExitStack() as stack:
            stack.callback(self.model.get_input_embeddings().register_forward_hook(start).remove)
            stack.enter_context(watched(self.model, taps, taps.names, real))
            logits = self.model(**arguments_of(batch, mask)).logits
            for draw in range(loss.probes):
                last = draw + 1 == loss.probes
                torch.autograd.backward(summed_loss(logits, batch, loss, draw), retain_graph=not last)


@contextmanager
def still(model: PreTrainedModel) -> Iterator[None]:
    """Holds a model in evaluation mode with frozen weights, and restores its state."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    model.requires_grad_(False)
    try:
        with in_evaluation(model):
            yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


def arguments_of(batch: Batch, mask: Tensor) -> dict[str, Any]:
    """Returns the arguments of a model: positions count from the first real token, where padding stands in front."""
    arguments: dict[str, Any] = {"input_ids": batch.input_ids.to(mask.device), "attention_mask": mask}
    if batch.token_type_ids is not None:
        arguments["token_type_ids"] = batch.token_type_ids.to(mask.device)
    if not bool(mask[:, 0].all()):
        arguments["position_ids"] = (mask.cumsum(dim=1) - 1).clamp_min(0)
    return arguments | {"use_cache": False}
