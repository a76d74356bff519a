"""Prompts and completions for a language model, trained with TRL."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from keeptune.data.calibration import tokenize_calibration
from keeptune.data.completions import TaskExamples, task_calibration, task_examples
from keeptune.data.sources import Row
from keeptune.pipeline.task_kinds.base import TaskKind
from keeptune.recipe.schema import Task
from keeptune.training.trainer import train

__all__ = ["COMPLETION"]


def _read(task: Task, rows: Sequence[Row], where: str) -> TaskExamples:
    return task_examples(rows, prompt=task.prompt or "", completion=task.completion or "", where=where)


def _tokens(
    examples: TaskExamples, count: int, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Sequence[Sequence[int]]:
    texts = [p + c for p, c in zip(examples.prompts[:count], examples.completions[:count], strict=True)]
    return tokenize_calibration(texts, tokenizer, max_length=max_length, where="task.train").sequences


COMPLETION = TaskKind(
    name="completion",
    metrics=("exact_match", "multiple_choice", "cross_entropy"),
    read=_read,
    sample=task_calibration,
    train=train,
    texts=lambda examples: examples.prompts,
    tokens=_tokens,
    standard=True,
)
