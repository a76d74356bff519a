"""Scoring a pair of models, before and after fine-tuning, on the same items."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from keeptune.evaluation.base_answers import KeptAnswers
from keeptune.evaluation.benchmarks import LABELS, SCORES, Benchmark, Item, load_items
from keeptune.evaluation.classification import classified, need_language_model
from keeptune.evaluation.generation import greedy_texts
from keeptune.evaluation.kinds import AnyBenchmark
from keeptune.evaluation.likelihood import log_likelihoods, losses_and_divergence
from keeptune.evaluation.metrics import exact_match, paired_interval
from keeptune.evaluation.model_pairs import ModelPair, Side, scoring
from keeptune.evaluation.results import BenchmarkResult, grouped, rate
from keeptune.evaluation.standard import NamedBenchmark, score_named
from keeptune.evaluation.tokenized import (
    Tokens,
    choice,
    context_limit,
    document,
    padding_id,
    prompt,
)
from keeptune.model.blocks import positions

__all__ = ["evaluate", "score_items"]

_LOG = logging.getLogger(__name__)
_SIDES: tuple[Side, Side] = ("before", "after")
Records = list[dict[str, Any]]
T = TypeVar("T", str, float)


def evaluate(
    pair: ModelPair,
    tokenizer: PreTrainedTokenizerBase,
    benchmark: AnyBenchmark,
    folder: Path,
    *,
    seed: int = 0,
    progress: bool = True,
    kept: KeptAnswers | None = None,
) -> BenchmarkResult:
    """Score a benchmark before and after fine-tuning.

    Args:
        pair: The models.
        tokenizer: Their tokenizer; its settings stay as they are.
        benchmark: What to score.
        folder: The folder that the benchmark's relative path starts from.
        seed: Seed of the bootstrap interval; nothing else is random.
        progress: Show a bar where stderr is a terminal and the work takes more than two seconds.
        kept: Where the base's answers are, so that it is not asked again; None asks it.

    Returns:
        The scores, their interval and the record of every item.
    """
    if isinstance(benchmark, NamedBenchmark):
        return score_named(pair, tokenizer, benchmark, seed=seed, progress=progress, kept=kept)
    items = load_items(benchmark, folder)
    return score_items(pair, tokenizer, benchmark, items, seed=seed, progress=progress, kept=kept)


def score_items(
    pair: ModelPair,
    tokenizer: PreTrainedTokenizerBase,
    benchmark: Benchmark,
    items: Sequence[Item],
    *,
    seed: int = 0,
    progress: bool = True,
    kept: KeptAnswers | None = None,
) -> BenchmarkResult:
    """Score items that are in memory already; see :func:`evaluate`.

    Args:
        pair: The models.
        tokenizer: Their tokenizer.
        benchmark: What to score.
        items: Items of the benchmark's metric, at least one.
        seed: Seed of the bootstrap interval.
        progress: Whether to show a bar.
        kept: Where the base's answers are.

    Returns:
        The result.
    """
    scorers = {
        "exact_match": _generated,
        "multiple_choice": _chosen,
        "cross_entropy": _predicted,
    }
    passes = len(items) if benchmark.metric == "cross_entropy" else 2 * len(items)
    if benchmark.metric == "multiple_choice":
        passes = 2 * sum(len(item.choices) for item in items)
    disable = None if progress else True
    with tqdm(total=passes, desc=benchmark.name, unit="seq", disable=disable, delay=2) as bar:
        if benchmark.metric in (*LABELS, *SCORES):
            return classified(pair, tokenizer, benchmark, items, seed=seed, advance=bar.update)
        need_language_model(pair, benchmark)
        records = scorers[benchmark.metric](pair, tokenizer, benchmark, items, bar.update, kept)
    return _result(benchmark, items, records, seed)


def _result(benchmark: Benchmark, items: Sequence[Item], records: Records, seed: int) -> BenchmarkResult:
    """Sum the items' records; losses are weighted by tokens, other scores by items."""
    losses = benchmark.metric == "cross_entropy"
    weights = [float(record["tokens"]) if losses else 1.0 for record in records]
    before, after = (
        [record[side] * weight for record, weight in zip(records, weights, strict=True)] for side in _SIDES
    )
    divergences = [record["kl"] * weight for record, weight in zip(records, weights, strict=True) if losses]
    groups = [item.group for item in items]
    named = [{"index": item.index, "group": item.group} | record for item, record in zip(items, records, strict=True)]
    return BenchmarkResult(
        name=benchmark.name,
        role=benchmark.role,
        metric=benchmark.metric,
        n=len(items),
        before=rate(before, weights),
        after=rate(after, weights),
        interval=paired_interval(before, after, seed, weights=weights),
        kl_to_base=rate(divergences, weights) if losses else None,
        groups=grouped(groups, before, after, weights),
        items=named,
    )


def _generated(
    pair: ModelPair,
    tokenizer: PreTrainedTokenizerBase,
    benchmark: Benchmark,
    items: Sequence[Item],
    advance: Callable[[int], object],
    kept: KeptAnswers | None,
) -> Records:
    """Exact match of greedily generated answers."""
    limit = _limit(pair, benchmark, benchmark.max_new_tokens)
    prompts = [
        prompt(
            tokenizer,
            item.prompt,
            limit,
            where=f"{benchmark.where} row {item.index + 1}",
        )
        for item in items
    ]
    _report_cuts(benchmark, prompts, limit)

    def generated(side: Side) -> list[str]:
        with scoring(pair, side) as model:
            return greedy_texts(
                model,
                tokenizer,
                prompts,
                rows=benchmark.batch_size,
                pad=padding_id(tokenizer),
                new_tokens=benchmark.max_new_tokens,
                stops=benchmark.stop,
                where=f"{benchmark.where} ({side})",
                advance=advance,
            )

    texts = _both_sides(generated, benchmark, prompts, kept)
    return [
        {
            "before": exact_match(first, item.answers, normalise=benchmark.normalise),
            "after": exact_match(second, item.answers, normalise=benchmark.normalise),
            "prompt": item.prompt,
            "answers": list(item.answers),
            "text_before": first,
            "text_after": second,
            "cut": tokens.cut,
        }
        for item, tokens, first, second in zip(items, prompts, texts["before"], texts["after"], strict=True)
    ]


def _chosen(
    pair: ModelPair,
    tokenizer: PreTrainedTokenizerBase,
    benchmark: Benchmark,
    items: Sequence[Item],
    advance: Callable[[int], object],
    kept: KeptAnswers | None,
) -> Records:
    """Accuracy of the likeliest choice, and of the likeliest per character."""
    limit = _limit(pair, benchmark, 0)
    sequences = [
        choice(
            tokenizer,
            item.prompt,
            text,
            limit,
            where=f"{benchmark.where} row {item.index + 1}",
        )
        for item in items
        for text in item.choices
    ]
    _report_cuts(benchmark, sequences, limit)

    def scored(side: Side) -> list[float]:
        with scoring(pair, side) as model:
            return log_likelihoods(
                model,
                sequences,
                rows=benchmark.batch_size,
                pad=padding_id(tokenizer),
                where=f"{benchmark.where} ({side})",
                advance=advance,
            )

    sums = _both_sides(scored, benchmark, sequences, kept)
    records, place = [], 0
    for item in items:
        end = place + len(item.choices)
        record: dict[str, Any] = {"label": item.label, "choices": list(item.choices)}
        for side in _SIDES:
            record |= _accuracies(item, sums[side][place:end], side)
        record["cut"] = any(tokens.cut for tokens in sequences[place:end])
        records.append(record)
        place = end
    return records


def _both_sides(
    ask: Callable[[Side], list[T]], benchmark: Benchmark, sequences: Sequence[Tokens], kept: KeptAnswers | None
) -> dict[Side, list[T]]:
    """Ask both models, the base only where its answers are not kept."""
    before = ask("before") if kept is None else kept.get(benchmark, sequences, lambda: ask("before"))
    return {"before": before, "after": ask("after")}


def _accuracies(item: Item, sums: Sequence[float], side: Side) -> Mapping[str, Any]:
    """Compare one item's log-likelihoods; of equal ones the first counts, as in lm-eval."""
    rates = [value / len(text) for value, text in zip(sums, item.choices, strict=True)]
    return {
        side: float(sums.index(max(sums)) == item.label),
        f"acc_norm_{side}": float(rates.index(max(rates)) == item.label),
        f"loglikelihoods_{side}": list(sums),
    }


def _predicted(
    pair: ModelPair,
    tokenizer: PreTrainedTokenizerBase,
    benchmark: Benchmark,
    items: Sequence[Item],
    advance: Callable[[int], object],
    _: KeptAnswers | None,
) -> Records:
    """Cross-entropy and KL(base || tuned), nats per token of each document."""
    limit = _limit(pair, benchmark, 0)
    documents = [
        document(tokenizer, item.text, limit, where=f"{benchmark.where} row {item.index + 1}") for item in items
    ]
    _report_cuts(benchmark, documents, limit)
    losses = losses_and_divergence(
        pair,
        documents,
        rows=benchmark.batch_size,
        pad=padding_id(tokenizer),
        where=benchmark.where,
        advance=advance,
    )
    return [
        {
            "before": found.before / found.tokens,
            "after": found.after / found.tokens,
            "kl": found.divergence / found.tokens,
            "tokens": found.tokens,
            "cut": tokens.cut,
        }
        for tokens, found in zip(documents, losses, strict=True)
    ]


def _limit(pair: ModelPair, benchmark: Benchmark, room: int) -> int:
    """Tokens kept of each sequence, the same before and after."""
    known = []
    for side in _SIDES:
        with scoring(pair, side) as model:
            known.append(positions(model))
    least = min((limit for limit in known if limit is not None), default=None)
    return context_limit(benchmark.max_length, room, least, where=benchmark.where)


def _report_cuts(benchmark: Benchmark, sequences: Sequence[Tokens], limit: int) -> None:
    cut = sum(tokens.cut for tokens in sequences)
    if cut:
        _LOG.warning(
            "%s: %d of %d sequences were cut to %d tokens.",
            benchmark.where,
            cut,
            len(sequences),
            limit,
        )
