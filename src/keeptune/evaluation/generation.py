"""Greedy generation in batches padded on the left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from unittest import mock

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

from keeptune.evaluation.likelihood import need_finite
from keeptune.evaluation.metrics import cut_at
from keeptune.evaluation.scored_tokens import Passes, ScoredTokens, padded_batches


def greedy_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[ScoredTokens],
    passes: Passes,
    *,
    new_tokens: int,
    stops: tuple[str, ...],
) -> list[str]:
    """Continues each prompt with the likeliest tokens, until an end token, a stop string or the limit.

    The model's own generation settings (sampling, penalties) do not apply, except its end tokens, nor do the
    tokenizer's settings of padding.

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
        pad_token_id=passes.pad,
        eos_token_id=sorted(ends) or None,
        bos_token_id=tokenizer.bos_token_id,
    )
    generate: Any = model.generate
    texts = [""] * len(prompts)
    # generate() fills what a given config leaves open from the model's own, and then warns about temperature.
    with mock.patch.object(model, "generation_config", config):
        for batch in padded_batches(prompts, rows=passes.rows, pad=passes.pad, side="left"):
            width = batch.ids.shape[1]
            ids: Tensor = generate(
                input_ids=batch.ids.to(model.device),
                attention_mask=batch.mask.to(model.device),
                generation_config=config,
                logits_processor=LogitsProcessorList([_Finite(passes.where)]),
                stopping_criteria=StoppingCriteriaList([_Stopped(tokenizer, width, stops)] if stops else []),
            )
            for member, new in zip(batch.members, ids[:, width:].tolist(), strict=True):
                length = next((place for place, token in enumerate(new) if token in ends), len(new))
                texts[member] = cut_at(_decode(tokenizer, new[:length]), stops)
            passes.advance(len(batch.members))
    return texts


class _Finite(LogitsProcessor):
    """Refuses logits that are NaN or +inf; -inf forbids a token and is allowed."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        need_finite(scores < math.inf, self.where, "logits")
        return scores


class _Stopped(StoppingCriteria):
    """Ends a row whose new text holds a stop string: saves time, the text is cut later."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, width: int, stops: tuple[str, ...]) -> None:
        self.tokenizer = tokenizer
        self.width = width
        self.stops = stops

    def __call__(self, input_ids: Tensor, scores: object, **kwargs: object) -> Tensor:
        texts = [_decode(self.tokenizer, ids) for ids in input_ids[:, self.width :].tolist()]
        done = [any(stop in text for stop in self.stops) for text in texts]
        return torch.tensor(done, device=input_ids.device)


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Returns the model's end tokens (often several), or else the tokenizer's."""
    config = model.generation_config
    named = config.eos_token_id if config is not None else None
    named = tokenizer.eos_token_id if named is None else named
    listed = named if isinstance(named, list) else [named]
    return frozenset(int(token) for token in listed if token is not None)


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
