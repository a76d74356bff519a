"""The exact fast ways of KVA: only what a scaled output can change is run again.

Causality: the output of a down-projection at the last token changes the last token's stream only. So for ``last``, one
clean run keeps keys and values; then each (block, point of its path) is one token that enters its block beside those of
the blocks below, sees the kept keys and values as a prefix and its own as the rest, and one way back serves all blocks.

For ``all``, a block's scaled outputs change what all tokens see above it: the text is run again from the block's kept
input, without a graph, for its keys and values. Only the last token's stream, which is all that the gradient with
respect to its nodes passes through, is then run with a graph.

No architecture is named: hooks on blocks give them what the clean run gave them (:mod:`keeptune.model.probes.suffix`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from inspect import BoundArguments
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from keeptune.core.offload import device_of
from keeptune.data.calibration import Batch
from keeptune.model.probes.block_calls import BlockCalls, first_argument, hidden_of, take, with_hidden
from keeptune.model.probes.suffix import Suffix
from keeptune.model.runner import PassEnd, arguments_of

# Which down-projection, and where on its path.
State = tuple[int, float]


@dataclass
class CleanRun:
    """The states of the unchanged run, of the last token or of all (C is 1 or W).

    Args:
        mask: ``(B, W)``.
        last: ``(B, 1)``, the column of each text's last token.
        inputs: ``(B, C, hidden)`` of each block.
        calls: What else each block was given.
        outputs: ``(B, C, D)`` of each down-projection, float32.
        starts: The same of the baseline.
        cache: Keys and values.
        logits: ``(B, vocabulary)``, after the last token.
    """

    mask: Tensor
    last: Tensor
    inputs: list[Tensor]
    calls: list[BoundArguments]
    outputs: list[Tensor]
    starts: list[Tensor]
    cache: DynamicCache
    logits: Tensor


def last_columns(mask: Tensor) -> Tensor:
    """Returns the column of each text's last token, ``(B, 1)``, the padding on either side."""
    steps = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return (mask * steps).argmax(dim=1, keepdim=True)


@dataclass(frozen=True)
class ScaledNodes:
    """Runs what scaled nodes change, in a frozen model.

    Args:
        modules: The down-projections.
        layers: Their blocks' numbers.
        chunk: Tokens in a pass without a graph; with one, a quarter of it.
        score: The score of ``(n, vocabulary)`` logits and ``(n,)`` tokens.
    """

    model: PreTrainedModel
    blocks: tuple[nn.Module, ...]
    modules: tuple[nn.Module, ...]
    layers: tuple[int, ...]
    chunk: int
    score: Callable[[Tensor, Tensor], Tensor]

    def clean(self, batch: Batch, *, whole: bool, pad_token: int | None) -> CleanRun:
        """Runs texts as they are, without the head but for the last token.

        ``whole`` keeps all tokens' states, not only the last's; paths start at a run on ``pad_token``, None at zero.
        """
        mask = batch.attention_mask.to(device_of(self.model))
        last = last_columns(mask)

        def keep(values: Tensor) -> Tensor:
            return values if whole else take(values, last)

        watched, cache = BlockCalls(keep), DynamicCache()
        with torch.no_grad(), ExitStack() as stack:
            watched.watch(self.blocks, stack)
            more = {"use_cache": True, "past_key_values": cache}
            hidden, outputs = self._outputs(arguments_of(batch, mask) | more, mask, keep)
        with torch.no_grad():
            logits = self._tail(take(hidden, last))
            if pad_token is None:
                starts = [torch.zeros_like(output) for output in outputs]
            else:
                pads = Batch(torch.full_like(batch.input_ids, pad_token), batch.attention_mask)
                _, starts = self._outputs(arguments_of(pads, mask), mask, keep)
        return CleanRun(mask, last, watched.inputs, watched.calls, outputs, starts, cache, logits)

    def last(self, clean: CleanRun, wanted: Tensor, states: Sequence[State]) -> tuple[Tensor, Tensor]:
        """Scales outputs at the last token and scores tokens ``(B,)``; states are in the order of blocks.

        Returns:
            ``(states, B)``, the score; ``(states, B, D)``, its gradient with respect to the scaled output. Float32.
        """
        size = max(1, self.chunk // 4 // len(clean.mask))
        parts = []
        for first in range(0, len(states), size):
            some = states[first : first + size]
            leaves = {
                at: torch.stack([_path(clean, at, alpha)[:, 0] for other, alpha in some if other == at], dim=1)
                for at in dict(some)
            }

            def suffix(count: int) -> Suffix:
                columns = clean.last.expand(-1, count)
                return Suffix(clean.calls, clean.cache, clean.mask.shape[1], columns, alone=True)

            parts.append(self._streams(leaves, lambda number: clean.inputs[number], suffix, wanted))
        scores, gradients = (torch.cat(part, dim=1).transpose(0, 1) for part in zip(*parts, strict=True))
        return scores, gradients

    def all(self, clean: CleanRun, wanted: Tensor, states: Sequence[State]) -> tuple[Tensor, Tensor]:
        """Scales outputs at all tokens; as :meth:`last`, with gradients of the last token's scaled output."""
        size = max(1, self.chunk // clean.mask.numel())
        parts: list[tuple[Tensor, Tensor]] = []
        for at in dict(states):
            points = [alpha for other, alpha in states if other == at]
            for first in range(0, len(points), size):
                some = points[first : first + size]
                path = torch.cat([_path(clean, at, alpha) for alpha in some])
                cache = self._above(clean, at, path, len(some))
                # Rows are texts within points.
                suffix = Suffix(clean.calls, cache, clean.mask.shape[1], clean.last, alone=True, times=len(some))
                scores, gradients = self._streams(
                    {at: take(path, clean.last.repeat(len(some), 1))},
                    lambda number, suffix=suffix: suffix.rows(take(clean.inputs[number], clean.last)),  # type: ignore[misc]
                    lambda _, suffix=suffix: suffix,  # type: ignore[misc]
                    wanted.repeat(len(some)),
                )
                rows = len(clean.mask)
                parts.append((scores.reshape(-1, rows), gradients.reshape(len(some), rows, -1)))
        return torch.cat([scores for scores, _ in parts]), torch.cat([gradients for _, gradients in parts])

    def _outputs(
        self, arguments: Mapping[str, Any], mask: Tensor, keep: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Runs the model up to its last block; returns its output and those of the down-projections."""
        outputs: list[Tensor] = []

        def after(_: nn.Module, __: Any, output: Tensor) -> None:
            outputs.append(keep(output.reshape(*mask.shape, -1)).float())

        with ExitStack() as stack:
            for module in self.modules:
                stack.callback(module.register_forward_hook(after).remove)
            return self._last_hidden(stack, arguments), outputs

    def _last_hidden(self, stack: ExitStack, arguments: Mapping[str, Any]) -> Tensor:
        """Runs the model up to its last block, and returns its output."""
        final: list[Tensor] = []

        def leave(_: nn.Module, __: Any, output: Any) -> None:
            final.append(hidden_of(output))
            raise PassEnd

        stack.callback(self.blocks[-1].register_forward_hook(leave).remove)
        with suppress(PassEnd):
            self.model(**arguments)
        return final[0]

    def _above(self, clean: CleanRun, at: int, path: Tensor, times: int) -> DynamicCache:
        """Runs texts from a block on with its output scaled at all tokens, for keys and values above it."""
        layer, width = self.layers[at], clean.mask.shape[1]
        store = _Store(clean.cache, layer, len(self.blocks) - 1)
        if layer == len(self.blocks) - 1:
            return store
        columns = torch.arange(width, device=clean.mask.device).expand(len(clean.mask), -1)
        suffix = Suffix(clean.calls, clean.cache, width, columns, alone=False, times=times)

        def before(number: int) -> Any:
            def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                hidden = suffix.rows(clean.inputs[number]) if number == layer else first_argument(block, args, kwargs)
                return suffix.call(number, hidden, store)

            return hook

        with torch.no_grad(), ExitStack() as stack:
            for number in range(layer, len(self.blocks)):
                handle = self.blocks[number].register_forward_pre_hook(before(number), with_kwargs=True)
                stack.callback(handle.remove)
            stack.callback(
                self.modules[at].register_forward_hook(lambda *seen: path.to(seen[2]).reshape(seen[2].shape)).remove
            )
            with suppress(PassEnd):
                self.model(**self._one_token)
        return store

    def _streams(
        self,
        leaves: Mapping[int, Tensor],
        inputs: Callable[[int], Tensor],
        suffix: Callable[[int], Suffix],
        wanted: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Runs the last tokens' streams, entering with leaves ``(rows, n, D)``, and goes back through them.

        Returns ``(rows, states)`` and ``(rows, states, D)``; blocks get ``suffix`` of ``(rows, count)`` streams.
        """
        ready = {at: leaf.detach().requires_grad_(True) for at, leaf in leaves.items()}
        entering = {self.layers[at]: leaf.shape[1] for at, leaf in ready.items()}
        count = [0]

        def before(number: int) -> Any:
            def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
                new = entering.get(number, 0)
                rows = [first_argument(block, args, kwargs)] if count[0] else []
                rows += [inputs(number).expand(-1, new, -1)] if new else []
                count[0] += new
                return suffix(count[0]).call(number, torch.cat(rows, dim=1))

            return hook

        def scaling(leaf: Tensor) -> Any:
            def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
                there = output.reshape(len(leaf), count[0], -1)[:, : count[0] - leaf.shape[1]]
                return torch.cat([there, leaf.to(output)], dim=1).reshape(output.shape)

            return hook

        with torch.enable_grad(), ExitStack() as stack:
            for number in range(min(entering), len(self.blocks)):
                handle = self.blocks[number].register_forward_pre_hook(before(number), with_kwargs=True)
                stack.callback(handle.remove)
            for at, leaf in ready.items():
                stack.callback(self.modules[at].register_forward_hook(scaling(leaf)).remove)
            final = self._last_hidden(stack, self._one_token)
        scores, slopes, sizes = self._scored(final, wanted)
        gradients = torch.autograd.grad(final, list(ready.values()), slopes)
        return scores, torch.cat(gradients, dim=1) * sizes[..., None]

    def _scored(self, hidden: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores the last block's output ``(rows, n, hidden)``, a slice at a time; gradients are over powers of two."""
        flat = hidden.detach().flatten(0, 1)[:, None]
        tokens = wanted[:, None].expand(hidden.shape[:2]).flatten()
        vocabulary = self.model.config.get_text_config().vocab_size
        size = max(1, self.chunk * flat.shape[-1] // vocabulary)
        parts = []
        for first in range(0, len(flat), size):
            some = flat[first : first + size].requires_grad_(True)
            with torch.enable_grad():
                logits = self._tail(some)
                leaf = logits.detach().float().requires_grad_(True)
                scored = self.score(leaf, tokens[first : first + size])
            (slope,) = torch.autograd.grad(scored.sum(), leaf)
            # A probability near 0 or 1 has gradients that float16 would take for zero.
            power = torch.exp2(slope.abs().amax(dim=-1).clamp_min(1e-30).log2().round())
            (back,) = torch.autograd.grad(logits, some, (slope / power[:, None]).to(logits))
            parts.append((scored.detach(), back[:, 0], power))
        scores, slopes, powers = (torch.cat(part) for part in zip(*parts, strict=True))
        form = hidden.shape[:2]
        return scores.reshape(form), slopes.reshape(hidden.shape), powers.reshape(form)

    def _tail(self, hidden: Tensor) -> Tensor:
        """Runs what comes after the last block on ``(n, 1, hidden)``; the blocks run on one token, which is dropped."""
        handle = self.blocks[-1].register_forward_hook(lambda *seen: with_hidden(seen[2], hidden))
        try:
            return cast(Tensor, self.model(**self._one_token).logits)[:, 0]
        finally:
            handle.remove()

    @property
    def _one_token(self) -> dict[str, Any]:
        token = torch.zeros(1, 1, dtype=torch.long, device=device_of(self.model))
        return {"input_ids": token, "attention_mask": torch.ones_like(token), "use_cache": False}


def _path(clean: CleanRun, at: int, alpha: float) -> Tensor:
    start = clean.starts[at]
    return start + alpha * (clean.outputs[at] - start)


class _Store(DynamicCache):
    """Keys and values above a block; those of the block and below are the clean run's."""

    def __init__(self, clean: DynamicCache, layer: int, final: int) -> None:
        super().__init__()
        self.layer = layer
        self.final = final
        self.layers: list[Any] = [*clean.layers[: layer + 1], *[None] * (final - layer)]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Keeps them; those of the last block are all that is wanted of it."""
        if layer_idx > self.layer:
            self.layers[layer_idx] = SimpleNamespace(keys=key_states, values=value_states)
        if layer_idx == self.final:
            raise PassEnd
        return key_states, value_states
