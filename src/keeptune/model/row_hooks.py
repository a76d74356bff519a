"""What runners hand over: the rows of real tokens that reach modules, and the gradients that come back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from keeptune.core.errors import StatisticsError
from keeptune.model.blocks import is_nested
from keeptune.model.expert_taps import expert_names, watched_experts

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

    @property
    def names(self) -> set[str]:
        """All modules that are watched."""
        return {*self.forward, *self.with_gradients}


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
        ok = torch.stack([value.float() for value in self.largest.values()]).isfinite().tolist()
        for (name, what), fine in zip(self.largest, ok, strict=True):
            if not fine:
                raise StatisticsError(
                    name,
                    got=f"NaN or infinite {what} in {place}",
                    wanted="finite ones",
                    next_step="Load the model in float32 or bfloat16 and check the weights of the modules before it.",
                )


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

        if output is not None and name in taps.with_gradients:
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
            add = module.register_forward_hook if name in taps.with_gradients else module.register_forward_pre_hook
            stack.callback(add(watch(name)).remove)
        yield
