"""What a sequence classifier says of the items of a benchmark, before and after fine-tuning."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keeptune.core.errors import ModelError, RecipeError
from keeptune.data.labelled import Encoded, Texts, collator, encode, label_indices
from keeptune.evaluation.benchmarks import LABELS, Benchmark, Item
from keeptune.evaluation.label_metrics import agreement, agreement_interval
from keeptune.evaluation.model_pairs import ModelPair, scoring
from keeptune.evaluation.results import BenchmarkResult, grouped
from keeptune.model.blocks import positions
from keeptune.model.head import Head

__all__ = ["classified", "need_language_model"]

_LOG = logging.getLogger(__name__)


def classified(
    pair: ModelPair,
    tokenizer: PreTrainedTokenizerBase,
    benchmark: Benchmark,
    items: Sequence[Item],
    *,
    seed: int,
    advance: Callable[[int], object],
) -> BenchmarkResult:
    """Score labels or scores of a whole benchmark.

    Args:
        pair: The models.
        tokenizer: Their tokenizer.
        benchmark: What to score.
        items: Its items, at least one.
        seed: Seed of the bootstrap interval.
        advance: Told the number of sequences done after each batch.

    Returns:
        The result; groups are scored where the score is a mean over items (accuracy).

    Raises:
        RecipeError: The model has no head for this metric.
        DataError: An item's label is not one of the model's.
        ModelError: A model gives values that are not finite, or the two tell other labels apart.
    """
    names, limit = _head_and_limit(pair, benchmark)
    seconds = tuple(item.text_pair for item in items if item.text_pair is not None)
    texts = Texts(tuple(item.text for item in items), seconds or None)
    encoded = encode(tokenizer, texts, limit)
    if encoded.cut:
        _LOG.warning("%s: %d of %d sequences were cut to %d tokens.", benchmark.where, encoded.cut, len(items), limit)
    logits = {}
    for side in ("before", "after"):
        with scoring(pair, side) as model:
            logits[side] = _logits(
                model, tokenizer, encoded, benchmark.batch_size, f"{benchmark.where} ({side})", advance
            )
    truth = _truth(items, names, benchmark.where)
    said = {side: (found.argmax(-1) if names else found[:, 0]).numpy() for side, found in logits.items()}
    records = _records(items, names, truth, said)
    means = benchmark.metric == "accuracy"
    sides = [[float(record[side]) for record in records] for side in ("before", "after")]
    return BenchmarkResult(
        name=benchmark.name,
        role=benchmark.role,
        metric=benchmark.metric,
        n=len(items),
        before=agreement(benchmark.metric, truth, said["before"], len(names)),
        after=agreement(benchmark.metric, truth, said["after"], len(names)),
        interval=agreement_interval(benchmark.metric, truth, said["before"], said["after"], seed, len(names)),
        kl_to_base=None,
        groups=grouped([item.group for item in items], sides[0], sides[1], [1.0] * len(items)) if means else {},
        items=records,
    )


def _head_and_limit(pair: ModelPair, benchmark: Benchmark) -> tuple[tuple[str, ...], int]:
    """Read the labels, the same before and after, and how many tokens fit."""
    heads, limits = [], [benchmark.max_length]
    for side in ("before", "after"):
        with scoring(pair, side) as model:
            heads.append(Head.of(model))
            limits += [limit for limit in [positions(model)] if limit is not None]
    head = heads[0]
    if head is None or bool(head.labels) != (benchmark.metric in LABELS):
        raise _wrong_metric(benchmark, head)
    if heads[1] is None or heads[1].labels != head.labels:
        raise ModelError(
            benchmark.where,
            got=f"other labels after tuning than before ({', '.join(head.labels)})",
            wanted="the same labels in the same order",
            next_step="Load both models with the labels that the tuned one learned.",
        )
    return head.labels, min(limits)


def need_language_model(pair: ModelPair, benchmark: Benchmark) -> None:
    """Refuse a metric of generated or predicted tokens for a classifier.

    Args:
        pair: The models.
        benchmark: What is to be scored.

    Raises:
        RecipeError: The model is a classifier.
    """
    with scoring(pair, "before") as model:
        head = Head.of(model)
    if head is not None:
        raise _wrong_metric(benchmark, head)


def _wrong_metric(benchmark: Benchmark, head: Head | None) -> RecipeError:
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
    encoded: Encoded,
    rows: int,
    where: str,
    advance: Callable[[int], object],
) -> Tensor:
    """Compute ``(n, outputs)`` logits, float32 on the CPU, in batches of sequences of about equal length."""
    lengths = [len(ids) for ids in encoded.columns["input_ids"]]
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    pad = collator(tokenizer)
    found: list[Tensor] = [torch.empty(0)] * len(order)
    for start in range(0, len(order), rows):
        members = order[start : start + rows]
        batch = {name: value.to(model.device) for name, value in pad(encoded.rows(members)).items()}
        for member, row in zip(members, model(**batch).logits.float().cpu(), strict=True):
            found[member] = row
        advance(len(members))
    logits = torch.stack(found)
    if not bool(logits.isfinite().all()):
        raise ModelError(
            where,
            got="NaN or infinite logits",
            wanted="finite values",
            next_step="Look at the training loss for a jump, or load the model in float32.",
        )
    return logits


def _truth(items: Sequence[Item], names: Sequence[str], where: str) -> NDArray[Any]:
    if not names:
        return np.array([item.score for item in items], dtype=np.float64)
    return np.array(label_indices([item.answers[0] for item in items], names, where=where))


def _records(
    items: Sequence[Item], names: Sequence[str], truth: NDArray[Any], said: dict[str, NDArray[Any]]
) -> list[dict[str, Any]]:
    """Tell each item: right or wrong with the labels, or the scores."""
    records = []
    for place, item in enumerate(items):
        record: dict[str, Any] = {"index": item.index, "group": item.group}
        for side, values in said.items():
            record[side] = float(values[place] == truth[place]) if names else float(values[place])
        record["answer"] = names[truth[place]] if names else float(truth[place])
        if names:
            record |= {f"label_{side}": names[values[place]] for side, values in said.items()}
        records.append(record)
    return records
