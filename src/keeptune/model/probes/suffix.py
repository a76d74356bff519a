"""Blocks run on some columns of texts alone: what lies before them is in a kept run's keys and values.

Nothing here names an architecture. A block is given what it was given in the kept run (mask, positions, cache), cut to
the columns that run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from keeptune.model.probes.block_calls import BlockCall, KeptRun, UnfitError, take


@dataclass
class Suffix:
    """Some columns of each text, as further rows for blocks to run on.

    Args:
        run: The kept run, of B texts.
        width: Its columns, W.
        columns: ``(B, Q)``, the columns that run.
        alone: True when each column sees none of the others, only itself and what lies before it in the kept run; a
            column may then be there several times. False when the columns are the end of a text and see each other.
        times: How often the B texts are repeated.
        cache: Other keys and values than the kept run's, already repeated.
    """

    run: KeptRun
    width: int
    columns: Tensor
    alone: bool
    times: int = 1
    cache: DynamicCache | None = None
    prefix: int = field(init=False)
    _masks: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Count the kept run's columns that may be seen."""
        self.prefix = int(self.columns.max()) if self.alone else int(self.columns[0, 0])

    def rows(self, values: Tensor) -> Tensor:
        """Repeats ``(B, ...)`` to ``(times B, ...)``, repeats outside, and ``(1, ...)`` to ``(times, ...)``.

        What is already repeated stays.
        """
        if len(values) == 1:
            return values.expand(self.times, *values.shape[1:])
        if len(values) == self.times * len(self.columns):
            return values
        return values.repeat(self.times, *[1] * (values.ndim - 1))

    def call(self, number: int, hidden: Tensor, into: DynamicCache | None = None) -> BlockCall:
        """Returns the arguments that a block is called with, for hidden states ``(times B, Q, hidden)``.

        The block writes its keys and values ``into`` a cache; None puts the kept ones before them.

        Raises:
            UnfitError: The kept run gave the block something of unforeseen form.
        """
        given = self.run.calls[number]
        kept = next((value for value in given.values() if isinstance(value, DynamicCache)), None)
        if kept is None or "attention_mask" not in given:
            raise UnfitError("a block takes no key-value cache or no attention mask")

        def cut(name: str, value: Any) -> Any:
            if name == "attention_mask":
                return self.rows(self._mask(value))
            if value is kept:
                return _Prefix(self) if into is None else into
            return self._cut(value)

        return (hidden,), {name: cut(name, value) for name, value in given.items()}

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
        blocked = torch.zeros_like(rows[:1, :1, :1, :1])
        if blocked.dtype != torch.bool:
            blocked = torch.full_like(blocked, torch.finfo(blocked.dtype).min)
        if self.alone:
            own = torch.where(torch.eye(columns.shape[1], dtype=torch.bool, device=columns.device), own, blocked)
        seen = torch.where(before[:, None], rows[..., : self.prefix], blocked)
        self._masks[id(given)] = torch.cat([seen, own], dim=-1)
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
        kept: Any = (suffix.run.cache if suffix.cache is None else suffix.cache).layers[layer_idx]
        before = [suffix.rows(part[..., : suffix.prefix, :]) for part in (kept.keys, kept.values)]
        return torch.cat([before[0], key_states], dim=-2), torch.cat([before[1], value_states], dim=-2)
