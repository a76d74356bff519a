"""Items as tokens, which of them are scored; and what models say of them: likelihoods, KL divergences, greedy answers.

Layout: R rows of a batch, L tokens each, V vocabulary, N scored tokens of the batch. Rows are padded on the
right, where causal attention never looks, so positions need no care. Log-probabilities are float32, computed
for at most ``_CHUNK`` tokens at a time; sums over tokens are float64.
"""

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keeptune.core.errors import DataError, ModelError, RecipeError, need_finite
from keeptune.core.processes import divided
from keeptune.data.calibration import once
from keeptune.evaluation.metrics import cut_at
from keeptune.evaluation.model_pairs import ModelPair, of_both
from keeptune.model.continuation import Limits, continued, end_tokens, plain_text

LOGITS_AT_ONCE = 2**28  # elements of one batch of logits: 1 GiB in float32
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class ScoredTokens:
    """A token sequence of which ``ids[start:]`` are scored, each token given all before it."""

    ids: tuple[int, ...]
    start: int
    cut: bool  # tokens were left out to keep to a limit


@dataclass(frozen=True, slots=True)
class Passes:
    """How sequences go through a model."""

    rows: int  # sequences per forward pass at most
    pad: int  # token id of the padding
    where: str  # the benchmark and side, for error messages
    advance: Callable[[int], object] = lambda _: None  # called with the number of sequences done after each batch


@dataclass(frozen=True, slots=True)
class Encoder:
    """Items as at most ``limit`` tokens.

    Prompts are cut at their beginning, but for a leading start token; documents at their end.
    """

    tokenizer: PreTrainedTokenizerBase
    limit: int
    templated: bool = False  # texts are written by a chat template, which writes special tokens itself

    def document(self, text: str, where: str) -> ScoredTokens:
        """Encodes a document, special tokens as the tokenizer adds them; all but the first token are scored."""
        ids = self._encode(text)
        if len(ids) < 2:
            raise DataError(
                where,
                got=f"a document of {len(ids)} token",
                wanted="at least two tokens, so that one can be predicted",
                next_step="Remove the row.",
            )
        return ScoredTokens(tuple(ids[: self.limit]), 1, len(ids) > self.limit)

    def prompt(self, text: str, where: str) -> ScoredTokens:
        """Encodes a prompt to generate from; none of its tokens is scored."""
        ids = self._open_ended(text)
        _need_context(ids, where)
        kept = self._last(ids)
        return ScoredTokens(tuple(kept), len(kept), len(ids) > self.limit)

    def choice(self, text: str, answer: str, where: str) -> ScoredTokens:
        """Encodes a prompt with an answer after exactly one space, in a chat none; the answer's tokens are scored.

        Prompt and answer are encoded together, and the tokens beyond the length of the prompt encoded alone are
        the answer's, as in lm-eval.

        Raises:
            DataError: Prompt or answer have no token, or the answer alone is longer than the limit.
        """
        context, rest = self.joined(text, answer.strip())
        start = len(self._open_ended(context))
        return self.answered(self._open_ended(context + rest), start, f"the choice {answer!r}", where)

    def joined(self, text: str, answer: str) -> tuple[str, str]:
        """Returns a prompt and what follows it: an answer after exactly one space, in a chat none."""
        return (text, answer) if self.templated else (text.rstrip(" "), f" {answer}")

    def answered(self, ids: Sequence[int], start: int, name: str, where: str) -> ScoredTokens:
        """Cuts the tokens of a prompt with an answer, which begins at ``start`` and is scored, as :meth:`choice`."""
        _need_context(ids[:start], where)
        found, length = self.followed(ids, start), len(ids) - start
        if found is None or length > self.limit - 2:
            raise DataError(
                where,
                got=f"{name} of {max(length, 0)} tokens",
                wanted=f"1 to {self.limit - 2} tokens after the prompt",
                next_step="Raise max_length if the choice is long; reword the prompt if it swallows the choice.",
            )
        return found

    def answer(self, text: str, answer: str) -> ScoredTokens | None:
        """Encodes a prompt with what follows it directly, which is scored up to the limit; None if nothing is left."""
        return self.followed(self._open_ended(text + answer), len(self._open_ended(text)))

    def followed(self, ids: Sequence[int], start: int) -> ScoredTokens | None:
        """Cuts tokens of which those from ``start`` on are scored, as :meth:`answer`."""
        whole = list(ids[: start + self.limit - 2])
        length = min(len(whole) - start, len(whole) - 1)
        if length < 1:
            return None
        kept = self._last(whole)
        return ScoredTokens(tuple(kept), len(kept) - length, len(whole) > self.limit)

    def _encode(self, text: str) -> list[int]:
        # verbose=False: no warning about texts longer than the model, they are cut here.
        ids = self.tokenizer(text, verbose=False, add_special_tokens=not self.templated)["input_ids"]
        return once(self.tokenizer, [list(ids)])[0]

    def _open_ended(self, text: str) -> list[int]:
        """Encodes a text to be continued: without the end token that some tokenizers add."""
        ids = self._encode(text)
        ends = len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id and not self.templated
        return ids[:-1] if ends else ids

    def _last(self, ids: list[int]) -> list[int]:
        if len(ids) <= self.limit:
            return ids
        # Many models answer nonsense without their start token.
        opening = ids[:1] if ids[0] == self.tokenizer.bos_token_id else []
        return opening + ids[len(ids) - self.limit + len(opening) :]


def _need_context(ids: Sequence[int], where: str) -> None:
    if not ids:
        raise DataError(
            where,
            got="a prompt of no tokens",
            wanted="at least one token before the answer",
            next_step="Correct the prompt template or the row.",
        )


def context_limit(max_length: int, new_tokens: int, model_limit: int | None, *, where: str) -> int:
    """Returns how many tokens of a prompt fit before ``new_tokens`` in a model of ``model_limit`` positions.

    Raises:
        RecipeError: Generation would leave no room for the prompt.
    """
    if model_limit is None:
        return max_length
    if model_limit - new_tokens < 2:
        raise RecipeError(
            f"{where}.max_new_tokens",
            got=str(new_tokens),
            wanted=f"at most {model_limit - 2}, for a model with {model_limit} positions",
            next_step="Lower max_new_tokens.",
        )
    return min(max_length, model_limit - new_tokens)


def in_batches(
    items: Sequence[T],
    length: Callable[[T], int],
    rows: int,
    compute: Callable[[Sequence[T]], list[R]],
    elements: Callable[[Sequence[T]], int] = len,
) -> list[R]:
    """Computes a result for each item in batches of about equal length; processes divide long and short ones alike.

    Args:
        items: The same on all processes.
        length: Tokens of an item.
        rows: Items of a batch at most.
        compute: Returns the results of a batch, whose items are longest first.
        elements: How many logits a batch has; those of several rows are 2**28 at most.

    Returns:
        The results in the order of the items.
    """

    def computed(own: Sequence[T]) -> list[R]:
        results: list[R] = []
        while left := own[len(results) : len(results) + rows]:
            while len(left) > 1 and elements(left) > LOGITS_AT_ONCE:
                left = left[:-1]
            results += compute(left)
        return results

    order = sorted(range(len(items)), key=lambda place: -length(items[place]))  # equal ones as they came
    results = dict(zip(order, divided([items[place] for place in order], computed), strict=True))
    return [results[place] for place in range(len(items))]


def padded(sequences: Sequence[ScoredTokens], pad: int) -> tuple[Tensor, Tensor]:
    """Pads R sequences to (R, L) ids and an (R, L) mask, 0 at padding, on the CPU."""
    rows = [torch.tensor(tokens.ids) for tokens in sequences]
    masks = [torch.ones_like(row) for row in rows]
    return pad_sequence(rows, batch_first=True, padding_value=pad), pad_sequence(masks, batch_first=True)


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


_CHUNK = 256
_LOG = logging.getLogger(__name__)


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

    return in_batches(sequences, _length, passes.rows, sums_of, _elements(model))


def losses_and_divergence(pair: ModelPair, sequences: Sequence[ScoredTokens], passes: Passes) -> list[dict[str, Any]]:
    """Computes each sequence's loss ``before`` and ``after``, ``kl``, KL(base || tuned), and the ``tokens`` scored.

    All are nats per token. Both models see one batch after the other, so that only one batch of logits is held.

    Raises:
        ModelError: A model gives values that are not finite, or the vocabularies differ.
    """

    def losses_of(batch: Sequence[ScoredTokens]) -> list[dict[str, Any]]:
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
        scored = zip(sums.T.tolist(), (len(tokens.ids) - tokens.start for tokens in batch), strict=True)
        return [{"before": b / n, "after": a / n, "kl": kl / n, "tokens": n} for (b, a, kl), n in scored]

    elements, _ = of_both(pair, _elements)
    return in_batches(sequences, _length, passes.rows, losses_of, elements)


def add_divergence(
    pair: ModelPair, records: Sequence[dict[str, Any]], answers: Sequence[ScoredTokens | None], passes: Passes
) -> None:
    """Adds KL(base || tuned) on right answers to items' records: ``kl``, nats per token, and ``kl_tokens``.

    On the task's data it predicts what is forgotten elsewhere (RL's Razor, arXiv 2509.04259): E_{x ~ task}
    KL(base(x) || tuned(x)), here at each token of the answer given all before it. Items without an answer have none.
    """
    before, after = of_both(pair, vocabulary_of)
    if before != after:
        _LOG.warning("%s: no KL to the base, whose vocabulary is another", passes.where)
        return
    placed = [(record, tokens) for record, tokens in zip(records, answers, strict=True) if tokens is not None]
    losses = losses_and_divergence(pair, [tokens for _, tokens in placed], passes)
    for (record, _), loss in zip(placed, losses, strict=True):
        record |= {"kl": loss["kl"], "kl_tokens": loss["tokens"]}


def _length(tokens: ScoredTokens) -> int:
    return len(tokens.ids)


def vocabulary_of(model: PreTrainedModel) -> int:
    """Returns how many logits a model has for a token."""
    return int(model.config.get_text_config().vocab_size)


def limits_logits(model: PreTrainedModel) -> bool:
    """Returns whether a model computes logits of the last places alone where it is asked to."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def _columns(batch: Sequence[ScoredTokens]) -> int:
    """Returns in how many of a batch's last places a token to be scored is predicted, or lies."""
    return max(map(_length, batch)) - min(tokens.start for tokens in batch) + 1


def _elements(model: PreTrainedModel) -> Callable[[Sequence[ScoredTokens]], int]:
    vocabulary, limits = vocabulary_of(model), limits_logits(model)
    return lambda batch: len(batch) * vocabulary * (_columns(batch) if limits else max(map(_length, batch)))


def _logits(model: PreTrainedModel, batch: Sequence[ScoredTokens], passes: Passes) -> Tensor:
    """Returns the logits of the last places (R, C, V), from the first that is needed on; a model may give all."""
    ids, mask = (part.to(model.device) for part in padded(batch, passes.pad))
    limit = {"logits_to_keep": _columns(batch)} if limits_logits(model) else {}
    logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False, **limit).logits
    return logits[:, -_columns(batch) :]


def _chunks(batch: Sequence[ScoredTokens]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yields the scored tokens of a batch as (row, which of the last columns predicts it, token id)."""
    first = max(map(_length, batch)) - _columns(batch)
    row = torch.cat([torch.full((len(tokens.ids) - tokens.start,), index) for index, tokens in enumerate(batch)])
    column = torch.cat([torch.arange(tokens.start - 1, len(tokens.ids) - 1) for tokens in batch]) - first
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
