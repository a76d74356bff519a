"""Task data for TRL: prompt and completion columns; the loss is taken on the completion only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from datasets import Dataset

from keeptune.core.artefact import content_key
from keeptune.data.prompts import render
from keeptune.data.sources import Row

__all__ = ["TaskExamples", "task_examples"]


@dataclass(frozen=True, slots=True)
class TaskExamples:
    """Rendered prompts and completions.

    Args:
        prompts: What the model reads.
        completions: What it learns to write; TRL appends the end-of-text token.
    """

    prompts: tuple[str, ...]
    completions: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """Content key of the texts, in order: training depends on it."""
        return content_key([self.prompts, self.completions])

    def dataset(self) -> Dataset:
        """Give the columns that ``SFTTrainer`` reads.

        Returns:
            A dataset with ``prompt`` and ``completion``.
        """
        return Dataset.from_dict({"prompt": list(self.prompts), "completion": list(self.completions)})


def task_examples(rows: Sequence[Row], *, prompt: str, completion: str, where: str) -> TaskExamples:
    """Render task rows.

    Args:
        rows: The rows.
        prompt: Template of the prompt.
        completion: Template of the completion, usually starting with a space.
        where: The recipe key, for error messages.

    Returns:
        The examples.

    Raises:
        DataError: A row lacks a field.
    """
    places = [f"{where} row {number}" for number in range(1, len(rows) + 1)]
    return TaskExamples(
        prompts=tuple(render(prompt, row, where=place) for row, place in zip(rows, places, strict=True)),
        completions=tuple(render(completion, row, where=place) for row, place in zip(rows, places, strict=True)),
    )
