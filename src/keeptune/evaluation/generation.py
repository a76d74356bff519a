"""Greedy answers to the prompts of a benchmark."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keeptune.evaluation.metrics import cut_at
from keeptune.evaluation.scored_tokens import Passes, ScoredTokens, longest_first
from keeptune.model.continuation import Limits, continued, end_tokens, plain_text


def greedy_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[ScoredTokens],
    passes: Passes,
    *,
    new_tokens: int,
    stops: tuple[str, ...],
    ends: frozenset[int] = frozenset(),
) -> list[str]:
    """Continues each prompt with the likeliest tokens, until an end token, a stop string or the limit.

    In a chat the end of a turn (``ends``) ends a text too.

    Returns:
        One text per prompt, without the prompt and without special tokens.

    Raises:
        ModelError: The model gives logits that are not finite.
    """
    ends = ends | end_tokens(model, tokenizer)
    limits = Limits(new_tokens, ends, passes.pad, passes.where, stops)
    texts = [""] * len(prompts)
    order = longest_first([len(prompt.ids) for prompt in prompts])
    for start in range(0, len(order), passes.rows):
        members = order[start : start + passes.rows]
        written = continued(model, tokenizer, [prompts[member].ids for member in members], limits)
        for member, new in zip(members, written, strict=True):
            own = new[:-1] if new and new[-1] in ends else new
            texts[member] = cut_at(plain_text(tokenizer, own), stops)
        passes.advance(len(members))
    return texts
