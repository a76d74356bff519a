"""Prompts and completions for a language model, trained with TRL."""

from __future__ import annotations

from collections.abc import Sequence

from keeptune.data.completions import TaskExamples, task_examples
from keeptune.data.sources import Row
from keeptune.pipeline.task_kinds.base import TaskKind
from keeptune.recipe.schema import Task
from keeptune.training.trainer import train

__all__ = ["COMPLETION"]


def _read(task: Task, rows: Sequence[Row], where: str) -> TaskExamples:
    return task_examples(rows, prompt=task.prompt or "", completion=task.completion or "", where=where)


COMPLETION = TaskKind(
    name="completion",
    metrics=("exact_match", "multiple_choice", "cross_entropy"),
    read=_read,
    train=train,
    standard=True,
)
