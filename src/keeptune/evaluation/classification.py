"""Scores of a sequence classifier or a regression on the items of a benchmark, before and after fine-tuning."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keeptune.core.errors import ModelError, RecipeError
from keeptune.data.labelled import Texts, collator, label_indices
from keeptune.evaluation.benchmarks import FileBenchmark
from keeptune.evaluation.items import Item
from keeptune.evaluation.metrics import LABELS
from keeptune.evaluation.model_pairs import SIDES, ModelPair, of_both, scoring, shared_positions
from keeptune.evaluation.results import BenchmarkResult, grouped, label_scores
from keeptune.evaluation.scored_tokens import in_batches
from keeptune.model.continuation import need_finite
from keeptune.model.head import Head

_LOG = logging.getLogger(__name__)


def classified(
    pair: ModelPair,
    tokenizer: PreTrainedTokenizerBase,
    benchmark: FileBenchmark,
    items: Sequence[Item],
    *,
    seed: int,
    advance: Callable[[int], object],
) -> BenchmarkResult:
    """Scores the labels or scores that both models predict; groups are scored where the score is a mean (accuracy).

    Raises:
        RecipeError: The model has no head for this metric.
        DataError: An item's label is not one of the model's.
        ModelError: A model gives values that are not finite, or the two have different labels.
    """
    names = _labels(pair, benchmark)
    limit = min(benchmark.max_length, shared_positions(pair) or benchmark.max_length)
    seconds = tuple(item.text_pair for item in items if item.text_pair is not None)
    encoded, cut = Texts(tuple(item.text for item in items), seconds or None).encode(tokenizer, limit)
    if cut:
        _LOG.warning("%s: %d of %d sequences were cut to %d tokens.", benchmark.where, len(cut), len(items), limit)
    predicted = {}
    for side in SIDES:
        with scoring(pair, side) as model:
            logits = _logits(model, tokenizer, encoded.to_list(), benchmark.batch_size, advance)
        need_finite(logits.isfinite(), f"{benchmark.where} ({side})", "logits")
        predicted[side] = (logits.argmax(-1) if names else logits[:, 0]).numpy()
    if names:
        truth = np.array(label_indices([item.answers[0] for item in items], names, where=benchmark.where))
    else:
        truth = np.array([item.score for item in items], dtype=np.float64)
    records = [
        _record(item, names, truth[at], {s: v[at] for s, v in predicted.items()}) for at, item in enumerate(items)
    ]
    scores = label_scores(benchmark.metric, truth, predicted["before"], predicted["after"], len(names), seed)
    if benchmark.metric == "accuracy":
        before, after = ([float(record[side]) for record in records] for side in SIDES)
        scores["groups"] = grouped([item.group for item in items], before, after, [1.0] * len(items))
    return BenchmarkResult(
        name=benchmark.name, role=benchmark.role, metric=benchmark.metric, n=len(items), items=records, **scores
    )


def _labels(pair: ModelPair, benchmark: FileBenchmark) -> tuple[str, ...]:
    head, after = of_both(pair, Head.of)
    if head is None or bool(head.labels) != (benchmark.metric in LABELS):
        raise wrong_metric(benchmark, head)
    if after is None or after.labels != head.labels:
        raise ModelError(
            benchmark.where,
            got=f"other labels after tuning than before ({', '.join(head.labels)})",
            wanted="the same labels in the same order",
            next_step="Load both models with the labels that the tuned one learned.",
        )
    return head.labels


def wrong_metric(benchmark: FileBenchmark, head: Head | None) -> RecipeError:
    """Returns the error of a metric that is not of this kind of model."""
    kind = "language model" if head is None else "classifier" if head.labels else "regression"
    return RecipeError(
        f"{benchmark.where}.metric",
        got=f"{benchmark.metric} for a {kind}",
        wanted="exact_match, multiple_choice or cross_entropy for a language model; accuracy, f1 or matthews for a "
        "classifier; pearson or spearman for a regression",
        next_step="Choose a metric for this kind of model.",
    )


def _logits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Sequence[Mapping[str, Any]],
    rows: int,
    advance: Callable[[int], object],
) -> Tensor:
    pad = collator(tokenizer)

    def logits_of(members: Sequence[Mapping[str, Any]]) -> list[list[float]]:
        batch = {name: value.to(model.device) for name, value in pad(members).items()}
        logits: list[list[float]] = model(**batch).logits.float().tolist()
        advance(len(members))
        return logits

    return torch.tensor(in_batches(encoded, lambda row: len(row["input_ids"]), rows, logits_of))


def _record(item: Item, names: Sequence[str], truth: Any, predicted: Mapping[str, Any]) -> dict[str, Any]:
    record: dict[str, Any] = {"index": item.index, "group": item.group}
    if not names:
        return record | {side: float(value) for side, value in predicted.items()} | {"answer": float(truth)}
    record |= {side: float(value == truth) for side, value in predicted.items()} | {"answer": names[truth]}
    return record | {f"label_{side}": names[value] for side, value in predicted.items()}
