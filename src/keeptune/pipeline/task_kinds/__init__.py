"""The kinds of task, a file for those of one trainer: what a recipe's ``task.kind`` means."""

from __future__ import annotations

from keeptune.pipeline.task_kinds.base import TaskKind
from keeptune.pipeline.task_kinds.completions import COMPLETION
from keeptune.pipeline.task_kinds.labels import CLASSIFICATION, REGRESSION

__all__ = ["KINDS", "TaskKind"]

KINDS = {kind.name: kind for kind in (COMPLETION, CLASSIFICATION, REGRESSION)}
