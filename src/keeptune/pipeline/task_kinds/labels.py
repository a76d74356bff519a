"""Texts, or pairs of texts, with a label or a score each, for a sequence classifier, trained with Transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedTokenizerBase

from keeptune.data.labelled import (
    LabelledExamples,
    Texts,
    classified_examples,
    encode,
    label_indices,
    labelled_calibration,
    scored_examples,
)
from keeptune.data.sources import Row
from keeptune.evaluation.items import Item
from keeptune.evaluation.metrics import LABELS, SCORES
from keeptune.model.head import Head
from keeptune.pipeline.task_kinds.base import TaskKind
from keeptune.recipe.schema import Task
from keeptune.training.classifier import train_classifier

__all__ = ["CLASSIFICATION", "REGRESSION"]


def _read_scores(task: Task, rows: Sequence[Row], where: str) -> LabelledExamples:
    return scored_examples(rows, text=task.text or "", text_pair=task.text_pair, label=task.label or "", where=where)


def _read_labels(task: Task, rows: Sequence[Row], where: str) -> LabelledExamples:
    text, label = task.text or "", task.label or ""
    return classified_examples(rows, text=text, text_pair=task.text_pair, label=label, names=task.labels, where=where)


def _tokens(
    examples: LabelledExamples, count: int, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Sequence[Sequence[int]]:
    second = examples.texts.second
    texts = Texts(examples.texts.first[:count], second and second[:count])
    return encode(tokenizer, texts, max_length).columns["input_ids"]


def _check_labels(examples: LabelledExamples, items: Sequence[Item], where: str) -> None:
    label_indices([item.answers[0] for item in items], examples.names, where=where)


REGRESSION = TaskKind(
    name="regression",
    metrics=SCORES,
    read=_read_scores,
    sample=labelled_calibration,
    train=train_classifier,
    texts=lambda examples: examples.texts.whole,
    tokens=_tokens,
    head=lambda examples, seed: Head(examples.names, seed),
)
CLASSIFICATION = replace(
    REGRESSION, name="classification", metrics=LABELS, read=_read_labels, check_items=_check_labels
)
