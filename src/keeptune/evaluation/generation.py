"""Greedy generation in batches padded on the left."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from keeptune.core.errors import ModelError
from keeptune.evaluation.metrics import cut_at
from keeptune.evaluation.tokenized import Batch, Tokens, batches

__all__ = ["greedy_texts"]


def greedy_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Tokens],
    *,
    rows: int,
    pad: int,
    new_tokens: int,
    stops: tuple[str, ...],
    where: str,
    advance: Callable[[int], object],
) -> list[str]:
    """Continue each prompt with the likeliest tokens, until an end token, a stop string or the limit.

    The model's own generation settings (sampling, penalties) do not apply, except its end tokens.

    Args:
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer; its settings are neither used nor changed.
        prompts: Prompts.
        rows: Prompts per batch at most.
        pad: Token id of the padding.
        new_tokens: Tokens generated at most.
        stops: Strings before which a text ends.
        where: The benchmark and side, for error messages.
        advance: Told the number of prompts done after each batch.

    Returns:
        One text per prompt, without the prompt and without special tokens.

    Raises:
        ModelError: The model gives logits that are not finite.
    """
    ends = _end_tokens(model, tokenizer)
    make: Any = GenerationConfig  # its constructor is untyped
    config: GenerationConfig = make(
        do_sample=False,
        num_beams=1,
        max_new_tokens=new_tokens,
        pad_token_id=pad,
        eos_token_id=sorted(ends) or None,
        bos_token_id=tokenizer.bos_token_id,
    )
    texts = [""] * len(prompts)
    with _only(model, config):
        for batch in batches(prompts, rows=rows, pad=pad, side="left"):
            new = _continue(model, tokenizer, batch, config, stops, where)
            for member, ids in zip(batch.members, new, strict=True):
                texts[member] = cut_at(_decode(tokenizer, _until_end(ids, ends)), stops)
            advance(len(batch.members))
    return texts


def _continue(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: Batch,
    config: GenerationConfig,
    stops: tuple[str, ...],
    where: str,
) -> list[list[int]]:
    width = batch.ids.shape[1]
    generate: Any = model.generate
    ids: Tensor = generate(
        input_ids=batch.ids.to(model.device),
        attention_mask=batch.mask.to(model.device),
        generation_config=config,
        logits_processor=LogitsProcessorList([_Finite(where)]),
        stopping_criteria=StoppingCriteriaList([_Stopped(tokenizer, width, stops)] if stops else []),
    )
    new: list[list[int]] = ids[:, width:].tolist()
    return new


class _Finite(LogitsProcessor):
    """Refuse logits that are NaN or +inf; -inf forbids a token and is allowed."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not bool((scores < math.inf).all()):
            raise ModelError(
                self.where,
                got="NaN or infinite logits",
                wanted="finite values",
                next_step="Look at the training loss for a jump, or load the model in float32.",
            )
        return scores


class _Stopped(StoppingCriteria):
    """A row is done when its new text holds a stop string: saves time, the text is cut later."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, width: int, stops: tuple[str, ...]) -> None:
        self.tokenizer = tokenizer
        self.width = width
        self.stops = stops

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        texts = [_decode(self.tokenizer, ids) for ids in input_ids[:, self.width :].tolist()]
        done = [any(stop in text for stop in self.stops) for text in texts]
        return torch.tensor(done, device=input_ids.device)


@contextmanager
def _only(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    # generate() fills what a given config leaves open from the model's own, and then warns about temperature.
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Collect the model's end tokens (often several), or else the tokenizer's."""
    config = model.generation_config
    named = config.eos_token_id if config is not None else None
    named = tokenizer.eos_token_id if named is None else named
    listed = named if isinstance(named, list) else [named]
    return frozenset(int(token) for token in listed if token is not None)


def _until_end(ids: list[int], ends: frozenset[int]) -> list[int]:
    length = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return ids[:length]


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
