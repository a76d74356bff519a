"""Log-likelihoods, losses and KL divergences of given tokens.

Layout: R rows of a batch, L tokens each, V vocabulary, N scored tokens of the batch. Rows are padded on the
right, where causal attention never looks, so positions need no care. Log-probabilities are float32, computed
for at most ``_CHUNK`` tokens at a time; sums over tokens are float64.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from keeptune.core.errors import ModelError
from keeptune.evaluation.model_pairs import ModelPair, of_both
from keeptune.evaluation.scored_tokens import Passes, ScoredTokens, in_batches, padded
from keeptune.model.continuation import need_finite

_CHUNK = 256
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Losses:
    """Sums over the scored tokens of one sequence, losses and KL(base || tuned) in nats."""

    tokens: int
    before: float
    after: float
    divergence: float


def log_likelihoods(model: PreTrainedModel, sequences: Sequence[ScoredTokens], passes: Passes) -> list[float]:
    """Returns the log-likelihood of each sequence's scored tokens, nats.

    Raises:
        ModelError: The model gives values that are not finite.
    """

    def sums_of(batch: Sequence[ScoredTokens]) -> list[float]:
        logits = _logits(model, batch, passes)
        sums = torch.zeros(len(batch), dtype=torch.float64)
        for row, column, target in _chunks(batch):
            sums.index_add_(0, row, _at(_log_probabilities(logits, row, column), target))
        need_finite(sums.isfinite(), passes.where, "log-probabilities")
        passes.advance(len(batch))
        return sums.tolist()

    return in_batches(sequences, _length, passes.rows, sums_of, vocabulary=_vocabulary(model))


def losses_and_divergence(pair: ModelPair, sequences: Sequence[ScoredTokens], passes: Passes) -> list[Losses]:
    """Computes each sequence's loss before and after, and KL(base || tuned) on the same tokens.

    Both models see one batch after the other, so that only one batch of logits of each is held.

    Raises:
        ModelError: A model gives values that are not finite, or the vocabularies differ.
    """

    def losses_of(batch: Sequence[ScoredTokens]) -> list[Losses]:
        base, tuned = of_both(pair, lambda model: _logits(model, batch, passes))
        if base.shape != tuned.shape:
            raise ModelError(
                passes.where,
                got=f"vocabularies of {base.shape[-1]} before and {tuned.shape[-1]} after",
                wanted="one vocabulary, so that the predictions can be compared",
                next_step="Add the tuned model's new tokens to the base model, or drop this benchmark.",
            )
        sums = torch.zeros(3, len(batch), dtype=torch.float64)
        for row, column, target in _chunks(batch):
            first, second = (_log_probabilities(logits, row, column) for logits in (base, tuned))
            sums[0].index_add_(0, row, -_at(first, target))
            sums[1].index_add_(0, row, -_at(second, target))
            sums[2].index_add_(0, row, _divergence(first, second.to(first.device)))
        for side, values in zip(("before", "after", "KL divergence"), sums, strict=True):
            need_finite(values.isfinite(), f"{passes.where} ({side})", "log-probabilities")
        passes.advance(len(batch))
        return [Losses(len(s.ids) - s.start, *own) for s, own in zip(batch, sums.T.tolist(), strict=True)]

    vocabulary, _ = of_both(pair, _vocabulary)
    return in_batches(sequences, _length, passes.rows, losses_of, vocabulary=vocabulary)


def add_divergence(
    pair: ModelPair, records: Sequence[dict[str, Any]], answers: Sequence[ScoredTokens | None], passes: Passes
) -> None:
    """Adds KL(base || tuned) on right answers to items' records: ``kl``, nats per token, and ``kl_tokens``.

    On the task's data it predicts what is forgotten elsewhere (RL's Razor, arXiv 2509.04259): E_{x ~ task}
    KL(base(x) || tuned(x)), here at each token of the answer given all before it. Items without an answer have none.
    """
    before, after = of_both(pair, _vocabulary)
    if before != after:
        _LOG.warning("%s: no KL to the base, whose vocabulary is another", passes.where)
        return
    placed = [(record, tokens) for record, tokens in zip(records, answers, strict=True) if tokens is not None]
    losses = losses_and_divergence(pair, [tokens for _, tokens in placed], passes)
    for (record, _), loss in zip(placed, losses, strict=True):
        record |= {"kl": loss.divergence / loss.tokens, "kl_tokens": loss.tokens}


def _length(tokens: ScoredTokens) -> int:
    return len(tokens.ids)


def _vocabulary(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().vocab_size)


def _logits(model: PreTrainedModel, batch: Sequence[ScoredTokens], passes: Passes) -> Tensor:
    ids, mask = padded(batch, passes.pad)
    logits: Tensor = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device), use_cache=False).logits
    return logits


def _chunks(batch: Sequence[ScoredTokens]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields the scored tokens of a batch as (row, column of the logits that predict it, token id)."""
    row = torch.cat([torch.full((len(tokens.ids) - tokens.start,), index) for index, tokens in enumerate(batch)])
    column = torch.cat([torch.arange(tokens.start - 1, len(tokens.ids) - 1) for tokens in batch])
    target = torch.cat([torch.tensor(tokens.ids[tokens.start :]) for tokens in batch])
    yield from zip(*(torch.split(part, _CHUNK) for part in (row, column, target)), strict=True)


def _log_probabilities(logits: Tensor, row: Tensor, column: Tensor) -> Tensor:
    picked = logits[row.to(logits.device), column.to(logits.device)]
    return torch.log_softmax(picked.float(), dim=-1)


def _at(log_probabilities: Tensor, target: Tensor) -> Tensor:
    """Returns each token's own log-probability: (N,) float64 on the CPU."""
    index = target.to(log_probabilities.device).unsqueeze(-1)
    return log_probabilities.gather(-1, index).squeeze(-1).double().cpu()


def _divergence(base: Tensor, tuned: Tensor) -> Tensor:
    """Computes KL(base || tuned) of (N, V) log-probabilities: (N,) float64 on the CPU."""
    # Some models forbid tokens with -inf; they contribute 0, where 0 * (-inf + inf) would be NaN.
    terms = torch.where(base > -torch.inf, base.exp() * (base - tuned), 0.0)
    return terms.sum(dim=-1).double().cpu()
