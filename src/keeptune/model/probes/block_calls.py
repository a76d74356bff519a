"""What the probes share: a run that is kept, blocks run on other hidden states, and what comes after the last block."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from keeptune.core.errors import ModelError
from keeptune.core.offload import device_of
from keeptune.data.calibration import Batch
from keeptune.model.runner import PassEnd, arguments_of

# What a block is called with: positions and names.
BlockCall = tuple[tuple[Tensor], dict[str, Any]]


class UnfitError(Exception):
    """A block cannot be run on some columns alone."""


@dataclass(frozen=True)
class KeptRun:
    """What a run gave the blocks.

    Args:
        inputs: ``(B, C, hidden)`` of each block, and the output of the last.
        calls: What else each block was given, by name.
        outputs: ``(B, C, D)`` of each watched module.
        cache: Keys and values of the whole texts.
    """

    inputs: list[Tensor]
    calls: list[dict[str, Any]]
    outputs: list[Tensor]
    cache: DynamicCache


@dataclass(frozen=True)
class Blocks:
    """The blocks of a frozen model; no architecture is named."""

    model: PreTrainedModel
    blocks: tuple[nn.Module, ...]

    def keep(
        self,
        batch: Batch,
        modules: Sequence[nn.Module],
        cut: Callable[[Tensor], Tensor] = lambda values: values,
        noise: Tensor | None = None,
    ) -> KeptRun:
        """Runs texts through the blocks and keeps what they were given, and what modules returned.

        Args:
            batch: Texts.
            modules: Which are watched, in the order in which they run.
            cut: Takes the columns that are kept.
            noise: ``(B, W, hidden)``, added to the token embeddings.

        Raises:
            ModelError: A module's output is no vector of each token.
        """
        mask = batch.attention_mask.to(device_of(self.model))
        run = KeptRun([], [], [], DynamicCache())

        def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            call = _call(block, args, kwargs)
            run.inputs.append(cut(call.pop(next(iter(call)))))
            run.calls.append(call)

        def after(_: nn.Module, __: Any, output: Any) -> None:
            values = hidden_of(output)
            if values.shape[:-1] not in (mask.shape, (mask.numel(),)):
                raise ModelError(
                    type(self.model).__name__,
                    got="a module whose output has another form than the hidden states",
                    wanted="one vector per token",
                    next_step="Trace block outputs.",
                )
            run.outputs.append(cut(values.reshape(*mask.shape, -1)))

        with torch.no_grad(), ExitStack() as stack:
            if noise is not None:
                embedding: Any = self.model.get_input_embeddings()
                stack.callback(embedding.register_forward_hook(lambda *seen: seen[2] + noise.to(seen[2])).remove)
            for block in self.blocks:
                stack.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
            for module in modules:
                stack.callback(module.register_forward_hook(after).remove)
            more = {"use_cache": True, "past_key_values": run.cache}
            run.inputs.append(cut(self._to_the_end(stack, arguments_of(batch, mask) | more)))
        return run

    def run(
        self,
        enter: Callable[[int, Tensor], BlockCall | None],
        hooks: Sequence[tuple[nn.Module, Callable[..., Any]]] = (),
    ) -> Tensor:
        """Runs the blocks on other hidden states; until those enter, one token runs, which is dropped.

        Args:
            enter: Takes a block's number and the hidden states before it, and returns the block's arguments, or None.
            hooks: Forward hooks of modules.

        Returns:
            The last block's output.
        """

        def before(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, number: int) -> Any:
            return enter(number, next(iter(_call(block, args, kwargs).values())))

        with ExitStack() as stack:
            for number, block in enumerate(self.blocks):
                hook = partial(before, number=number)
                stack.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)
            for module, after in hooks:
                stack.callback(module.register_forward_hook(after).remove)
            return self._to_the_end(stack, self._one_token)

    def tail(self, hidden: Tensor) -> Tensor:
        """Runs what comes after the last block on ``(n, Q, hidden)``; the blocks run on one token, which is dropped."""
        handle = self.blocks[-1].register_forward_hook(lambda *seen: with_hidden(seen[2], hidden))
        try:
            logits = cast(Tensor, self.model(**self._one_token).logits)
            return logits.reshape(*hidden.shape[:-1], -1)
        finally:
            handle.remove()

    def check(self, streams: Callable[[], Tensor], kept: Tensor, what: str) -> None:
        """Checks that blocks run on some columns alone give a kept run's numbers where nothing is changed.

        Raises:
            ModelError: They give others, or cannot be run so.
        """
        # In half precision the order of a sum shows.
        tolerance = 1e-4 if torch.finfo(self.model.dtype).eps < 1e-4 else 0.1
        try:
            gap = float((streams() - kept).abs().mean() / kept.abs().mean().clamp_min(1))
            wrong = "" if gap <= tolerance or not bool(torch.isfinite(kept).all()) else f"numbers differ by {gap:.1e}"
        except torch.OutOfMemoryError:
            raise
        # What a block of an unforeseen form may raise.
        except (UnfitError, RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
            wrong = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if wrong:
            raise ModelError(
                type(self.model).__name__,
                got=f"blocks that cannot be run on some tokens alone ({wrong})",
                wanted="attention over keys and values that are kept, and nothing else between tokens",
                next_step=f"There is no {what} of this architecture; take a method that does without.",
            )

    def _to_the_end(self, stack: ExitStack, arguments: dict[str, Any]) -> Tensor:
        """Runs the model up to its last block, and returns its output."""
        final: list[Tensor] = []

        def leave(_: nn.Module, __: Any, output: Any) -> None:
            final.append(hidden_of(output))
            raise PassEnd

        stack.callback(self.blocks[-1].register_forward_hook(leave).remove)
        with suppress(PassEnd):
            self.model(**arguments)
        return final[0]

    @property
    def _one_token(self) -> dict[str, Any]:
        token = torch.zeros(1, 1, dtype=torch.long, device=device_of(self.model))
        return {"input_ids": token, "attention_mask": torch.ones_like(token), "use_cache": False}


def _call(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Returns a block's arguments by name, the hidden states first."""
    bound = inspect.signature(block.forward).bind(*args, **kwargs)
    call = dict(bound.arguments)
    extra = next((n for n, p in bound.signature.parameters.items() if p.kind is p.VAR_KEYWORD), None)
    return call | call.pop(extra, {}) if extra else call


def hidden_of(output: Any) -> Tensor:
    """Returns the hidden states in what a module returned: the tensor, or a tuple that starts with it."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


def with_hidden(output: Any, hidden: Tensor) -> Any:
    """Returns a module's output with other hidden states in it."""
    return (hidden, *output[1:]) if isinstance(output, tuple) else hidden


def take(values: Tensor, columns: Tensor) -> Tensor:
    """Returns columns ``(B, Q)`` of ``(B, W, ...)``, or of ``(1, W, ...)`` for all texts alike: ``(B, Q, ...)``."""
    rows = torch.arange(len(columns), device=columns.device)[:, None] if len(values) > 1 else columns * 0
    return values[rows, columns]


def probabilities(logits: Tensor, wanted: Tensor) -> Tensor:
    """Computes the probability of tokens ``(...)`` at logits ``(..., vocabulary)``, in float32 or better: ``(...)``."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    chosen = logits.gather(-1, wanted[..., None]).squeeze(-1)
    return (chosen - logits.logsumexp(dim=-1)).exp()
