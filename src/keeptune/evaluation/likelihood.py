"""Log-likelihoods, losses and KL divergences of given tokens.

Layout: R rows of a batch, L tokens each, V vocabulary, N scored tokens of the batch. Rows are padded on the
right, where causal attention never looks, so positions need no care. Log-probabilities are float32, computed
for at most ``_CHUNK`` tokens at a time; sums over tokens are float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from keeptune.core.errors import ModelError
from keeptune.evaluation.model_pairs import ModelPair, Side, scoring
from keeptune.evaluation.tokenized import Batch, Tokens, batches

__all__ = ["Losses", "log_likelihoods", "losses_and_divergence"]

_CHUNK = 1024


@dataclass(frozen=True, slots=True)
class Losses:
    """Sums over the scored tokens of one sequence.

    Args:
        tokens: Number of scored tokens.
        before: Loss of the base model, nats.
        after: Loss of the tuned model, nats.
        divergence: KL(base || tuned), nats.
    """

    tokens: int
    before: float
    after: float
    divergence: float


def log_likelihoods(
    model: PreTrainedModel,
    sequences: Sequence[Tokens],
    *,
    rows: int,
    pad: int,
    where: str,
    advance: Callable[[int], object],
) -> list[float]:
    """Sum the log-probabilities of each sequence's scored tokens.

    Args:
        model: The model, in evaluation mode.
        sequences: Token sequences.
        rows: Sequences per forward pass at most.
        pad: Token id of the padding.
        where: The benchmark and side, for error messages.
        advance: Told the number of sequences done after each batch.

    Returns:
        One log-likelihood per sequence, nats.

    Raises:
        ModelError: The model gives values that are not finite.
    """
    results = [0.0] * len(sequences)
    width = _vocabulary(model)
    for batch in batches(sequences, rows=rows, pad=pad, side="right", vocabulary=width):
        logits = _logits(model, batch)
        sums = torch.zeros(len(batch.members), dtype=torch.float64)
        for row, column, target in _chunks(batch, sequences):
            picked = _at(_log_probabilities(logits, row, column), target)
            sums.index_add_(0, row, picked)
        _need_finite(sums, where)
        for member, value in zip(batch.members, sums.tolist(), strict=True):
            results[member] = value
        advance(len(batch.members))
    return results


def losses_and_divergence(
    pair: ModelPair,
    sequences: Sequence[Tokens],
    *,
    rows: int,
    pad: int,
    where: str,
    advance: Callable[[int], object],
) -> list[Losses]:
    """Compute each sequence's loss before and after, and KL(base || tuned) on the same tokens.

    Both models see one batch after the other, so that only one batch of logits of each is held.

    Args:
        pair: The models.
        sequences: Token sequences.
        rows: Sequences per forward pass at most.
        pad: Token id of the padding.
        where: The benchmark, for error messages.
        advance: Told the number of sequences done after each batch.

    Returns:
        One result per sequence.

    Raises:
        ModelError: A model gives values that are not finite, or the vocabularies differ.
    """
    results = [Losses(0, 0.0, 0.0, 0.0)] * len(sequences)
    with scoring(pair, "before") as model:
        width = _vocabulary(model)
    for batch in batches(sequences, rows=rows, pad=pad, side="right", vocabulary=width):
        base, tuned = _side(pair, "before", batch), _side(pair, "after", batch)
        if base.shape != tuned.shape:
            raise ModelError(
                where,
                got=f"vocabularies of {base.shape[-1]} before and {tuned.shape[-1]} after",
                wanted="one vocabulary, so that the predictions can be compared",
                next_step="Give the base model the tuned model's added tokens, or drop this benchmark.",
            )
        sums = torch.zeros(3, len(batch.members), dtype=torch.float64)
        for row, column, target in _chunks(batch, sequences):
            first, second = (_log_probabilities(logits, row, column) for logits in (base, tuned))
            sums[0].index_add_(0, row, -_at(first, target))
            sums[1].index_add_(0, row, -_at(second, target))
            sums[2].index_add_(0, row, _divergence(first, second.to(first.device)))
        for side, values in zip(("before", "after", "KL divergence"), sums, strict=True):
            _need_finite(values, f"{where} ({side})")
        for member, values in zip(batch.members, sums.T.tolist(), strict=True):
            count = len(sequences[member].ids) - sequences[member].start
            results[member] = Losses(count, *values)
        advance(len(batch.members))
    return results


def _side(pair: ModelPair, side: Side, batch: Batch) -> Tensor:
    with scoring(pair, side) as model:
        return _logits(model, batch)


def _logits(model: PreTrainedModel, batch: Batch) -> Tensor:
    """Compute (R, L, V) logits in the model's dtype."""
    ids, mask = batch.ids.to(model.device), batch.mask.to(model.device)
    logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits


def _vocabulary(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config().vocab_size)


def _chunks(batch: Batch, sequences: Sequence[Tokens]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """List the scored tokens of a batch as (row, column of the logits that predict it, token id)."""
    spans = [(sequences[member].start, len(sequences[member].ids)) for member in batch.members]
    row = torch.cat([torch.full((end - start,), index) for index, (start, end) in enumerate(spans)])
    column = torch.cat([torch.arange(start - 1, end - 1) for start, end in spans])
    target = batch.ids[row, column + 1]
    yield from zip(*(torch.split(part, _CHUNK) for part in (row, column, target)), strict=True)


def _log_probabilities(logits: Tensor, row: Tensor, column: Tensor) -> Tensor:
    """Take (N, V) log-probabilities in float32 from (R, L, V) logits."""
    picked = logits[row.to(logits.device), column.to(logits.device)]
    return torch.log_softmax(picked.float(), dim=-1)


def _at(log_probabilities: Tensor, target: Tensor) -> Tensor:
    """Take each token's own log-probability: (N,) float64 on the CPU."""
    index = target.to(log_probabilities.device).unsqueeze(-1)
    return log_probabilities.gather(-1, index).squeeze(-1).double().cpu()


def _divergence(base: Tensor, tuned: Tensor) -> Tensor:
    """Compute KL(base || tuned) of (N, V) log-probabilities: (N,) float64 on the CPU."""
    # Some models forbid tokens with -inf; they contribute 0, where 0 * (-inf + inf) would be NaN.
    terms = torch.where(base > -torch.inf, base.exp() * (base - tuned), 0.0)
    return terms.sum(dim=-1).double().cpu()


def _need_finite(values: Tensor, where: str) -> None:
    if not bool(values.isfinite().all()):
        raise ModelError(
            where,
            got="NaN or infinite log-probabilities",
            wanted="finite values",
            next_step="Look at the training loss for a jump, or load the model in float32.",
        )
