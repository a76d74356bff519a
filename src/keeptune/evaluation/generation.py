"""Greedy answers to the prompts of a benchmark."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keeptune.evaluation.metrics import cut_at
from keeptune.evaluation.scored_tokens import Passes, ScoredTokens, in_batches
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

    def texts_of(batch: Sequence[ScoredTokens]) -> list[str]:
        written = continued(model, tokenizer, [prompt.ids for prompt in batch], limits)
        passes.advance(len(batch))
        kept = (new[:-1] if new and new[-1] in ends else new for new in written)
        return [cut_at(plain_text(tokenizer, own), stops) for own in kept]

    return in_batches(prompts, lambda prompt: len(prompt.ids), passes.rows, texts_of)
