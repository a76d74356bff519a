"""Texts, or pairs of texts, with a label or a score each, for a sequence classifier, trained with Transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from keeptune.data.labelled import LabelledExamples, label_indices, labelled_examples
from keeptune.data.sources import Row
from keeptune.evaluation.items import Item
from keeptune.evaluation.metrics import LABELS, SCORES
from keeptune.model.head import Head
from keeptune.pipeline.task_kinds.base import TaskKind
from keeptune.recipe.schema import Task
from keeptune.training.trainer import train

__all__ = ["CLASSIFICATION", "REGRESSION"]


def _read(task: Task, rows: Sequence[Row], where: str, *, scores: bool) -> LabelledExamples:
    return labelled_examples(
        rows,
        text=task.text or "",
        text_pair=task.text_pair,
        label=task.label or "",
        names=task.labels,
        scores=scores,
        where=where,
    )


def _check_labels(examples: LabelledExamples, items: Sequence[Item], where: str) -> None:
    label_indices([item.answers[0] for item in items], examples.names, where=where)


REGRESSION = TaskKind(
    name="regression",
    metrics=SCORES,
    read=partial(_read, scores=True),
    train=train,
    head=lambda examples, seed: Head(examples.names, seed),
)
CLASSIFICATION = replace(
    REGRESSION, name="classification", metrics=LABELS, read=partial(_read, scores=False), check_items=_check_labels
)
