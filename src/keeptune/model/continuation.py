"""What a model writes after given tokens, a batch at a time."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from keeptune.core.errors import need_finite


@dataclass(frozen=True, slots=True)
class Limits:
    """Where texts end: at so many new tokens, or at an end token.

    ``stops`` are strings after which a text may end; this saves time, the text is not cut.
    """

    new_tokens: int
    ends: frozenset[int]
    pad: int
    where: str
    stops: tuple[str, ...] = ()


def continued(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    limits: Limits,
    pick: Callable[[Tensor, int], Tensor] | None = None,
) -> list[list[int]]:
    """Continues one batch of R prompts, token ids padded on the left.

    It is in evaluation mode (core/eval_mode.py). Its own generation settings (sampling, penalties) do not apply, nor do
    the tokenizer's settings of padding.
    ``pick`` goes from (R, V) logits and the number of tokens written so far to the next R; None is the likeliest.

    Returns:
        The new tokens of each prompt, an end token last where there is one.

    Raises:
        ModelError: The model gives logits that are not finite.
    """
    ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], True, limits.pad, "left")
    mask = pad_sequence([torch.ones(len(prompt), dtype=torch.long) for prompt in prompts], True, 0, "left")
    width = ids.shape[1]

    def picked(read: Tensor, logits: Tensor) -> Tensor:
        need_finite(logits < math.inf, limits.where, "logits")  # -inf forbids a token and is allowed
        if pick is None:
            return logits
        return torch.full_like(logits, -math.inf).scatter(1, pick(logits, read.shape[1] - width)[:, None], 0.0)

    def stopped(read: Tensor, logits: object, **kwargs: object) -> Tensor:
        texts = [plain_text(tokenizer, new) for new in read[:, width:].tolist()]
        return torch.tensor([any(stop in text for stop in limits.stops) for text in texts], device=read.device)

    make: Any = GenerationConfig  # its constructor is untyped
    config: GenerationConfig = make(
        do_sample=False,
        num_beams=1,
        max_new_tokens=limits.new_tokens,
        pad_token_id=limits.pad,
        eos_token_id=sorted(limits.ends) or None,
        bos_token_id=tokenizer.bos_token_id,
    )
    generate: Any = model.generate
    # generate() fills what a given config leaves open from the model's own, and then warns about temperature.
    with mock.patch.object(model, "generation_config", config):
        written: Tensor = generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=config,
            logits_processor=LogitsProcessorList([picked]),
            stopping_criteria=StoppingCriteriaList([stopped] if limits.stops else []),
        )
    rows: list[list[int]] = written[:, width:].tolist()
    ends = ([place for place, token in enumerate(new, start=1) if token in limits.ends] for new in rows)
    return [new[: min(own, default=len(new))] for new, own in zip(rows, ends, strict=True)]


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Returns the model's end tokens (often several), and the tokenizer's, which training ends texts with."""
    named = getattr(model.generation_config, "eos_token_id", None)
    listed = [*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id]
    return frozenset(int(token) for token in listed if token is not None)


def plain_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Returns what tokens say, without special tokens."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))
