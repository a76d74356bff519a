"""Blocks run on some columns of texts alone: what lies before them is in a kept run's keys and values.

Nothing here names an architecture. A block is given what it was given in the kept run (mask, positions, cache), cut to
the columns that run.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from keeptune.model.probes.block_calls import UnfitError, take


class Suffix:
    """Some columns of each text, as further rows for blocks to run on.

    Args:
        calls: What the kept run gave each block.
        cache: The kept run's keys and values, of B texts, or already repeated.
        width: The kept run's columns, W.
        columns: ``(B, Q)``, the columns that run.
        alone: True when each column sees none of the others, only itself and what lies before it in the kept run; a
            column may then be there several times. False when the columns are the end of a text and see each other.
        times: How often the B texts are repeated.
    """

    def __init__(
        self,
        calls: Sequence[inspect.BoundArguments],
        cache: DynamicCache,
        width: int,
        columns: Tensor,
        *,
        alone: bool,
        times: int = 1,
    ) -> None:
        self.calls = calls
        self.cache = cache
        self.width = width
        self.columns = columns
        self.alone = alone
        self.times = times
        self.prefix = int(columns.max()) if alone else int(columns[0, 0])
        self._masks: dict[int, Tensor] = {}

    def rows(self, values: Tensor) -> Tensor:
        """Repeats ``(B, ...)`` to ``(times B, ...)``, repeats outside, and ``(1, ...)`` to ``(times, ...)``.

        What is already repeated stays.
        """
        if len(values) == 1:
            return values.expand(self.times, *values.shape[1:])
        if len(values) == self.times * len(self.columns):
            return values
        return values.repeat(self.times, *[1] * (values.ndim - 1))

    def call(self, number: int, hidden: Tensor, cache: DynamicCache | None = None) -> Any:
        """Returns the arguments that a block is called with, for hidden states ``(times B, Q, hidden)``.

        The block writes its keys and values to ``cache``; None puts the kept ones before them.

        Raises:
            UnfitError: The kept run gave the block something of unforeseen form.
        """
        given = self.calls[number]
        call = inspect.BoundArguments(given.signature, type(given.arguments)())
        main = next(iter(given.arguments))
        named = dict(given.arguments)
        extra = next((n for n, p in given.signature.parameters.items() if p.kind is p.VAR_KEYWORD), None)
        flat = {**named, **named.get(extra, {})} if extra else named
        kept = next((value for value in flat.values() if isinstance(value, DynamicCache)), None)
        if kept is None or "attention_mask" not in flat:
            raise UnfitError("a block takes no key-value cache or no attention mask")

        def cut(name: str, value: Any) -> Any:
            if name == "attention_mask":
                return self.rows(self._mask(value))
            if value is kept:
                return _Prefix(self) if cache is None else cache
            return self._cut(value)

        for name, value in named.items():
            if name == extra:
                call.arguments[name] = {key: cut(key, inner) for key, inner in value.items()}
            else:
                call.arguments[name] = hidden if name == main else cut(name, value)
        return call.args, call.kwargs

    def _cut(self, value: Any) -> Any:
        """Takes the columns of whatever runs over the columns of a text, such as rotary angles."""
        if isinstance(value, tuple | list):
            return type(value)(self._cut(inner) for inner in value)
        if isinstance(value, dict):
            return {key: self._cut(inner) for key, inner in value.items()}
        if not isinstance(value, Tensor) or value.ndim < 2:
            return value
        if value.shape[0] in (1, len(self.columns)) and value.shape[1] == self.width:
            return self.rows(take(value, self.columns))
        raise UnfitError(f"a block takes a tensor of shape {tuple(value.shape)}")

    def _mask(self, given: Tensor | None) -> Tensor:
        """Builds the mask over prefix and own columns, from the block's mask over the whole text."""
        width, columns = self.width, self.columns
        if id(given) in self._masks:
            return self._masks[id(given)]
        full = given if given is not None else columns.new_ones(width, width, dtype=torch.bool).tril()[None, None]
        if full.ndim != 4 or full.shape[-2:] != (width, width):
            raise UnfitError(f"an attention mask of shape {tuple(full.shape)}")
        rows = full.expand(len(columns), -1, -1, -1).take_along_dim(columns[:, None, :, None], dim=2)
        before = torch.arange(self.prefix, device=columns.device) < columns[..., None]
        own = rows.take_along_dim(columns[:, None, None, :], dim=3)
        rest = torch.eye(columns.shape[1], dtype=torch.bool, device=columns.device) if self.alone else None
        blocked = torch.zeros_like(rows[:1, :1, :1, :1])
        if blocked.dtype != torch.bool:
            blocked = torch.full_like(blocked, torch.finfo(blocked.dtype).min)
        prefix = torch.where(before[:, None], rows[..., : self.prefix], blocked)
        own = own if rest is None else torch.where(rest, own, blocked)
        self._masks[id(given)] = torch.cat([prefix, own], dim=-1)
        return self._masks[id(given)]


class _Prefix(DynamicCache):
    """The kept run's keys and values before the columns' own."""

    def __init__(self, suffix: Suffix) -> None:
        super().__init__()
        self.suffix = suffix

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Returns both, the kept ones first."""
        suffix = self.suffix
        kept: Any = suffix.cache.layers[layer_idx]
        return (
            torch.cat([suffix.rows(kept.keys[..., : suffix.prefix, :]), key_states], dim=-2),
            torch.cat([suffix.rows(kept.values[..., : suffix.prefix, :]), value_states], dim=-2),
        )
