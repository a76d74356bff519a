"""Task data: prompts and completions, for TRL and for statistics; the loss is taken on the completion only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from keeptune.core.artefact import content_key
from keeptune.core.errors import DataError
from keeptune.data.calibration import Calibration
from keeptune.data.sources import Row
from keeptune.data.templates import render

__all__ = ["TaskExamples", "draw_rows", "task_calibration", "task_examples", "tokenize_pairs"]


@dataclass(frozen=True, slots=True)
class TaskExamples:
    """Rendered prompts and completions.

    Args:
        prompts: What the model reads.
        completions: What it learns to write; TRL appends the end-of-text token.
    """

    prompts: tuple[str, ...]
    completions: tuple[str, ...]

    def __len__(self) -> int:
        """Count the examples."""
        return len(self.prompts)

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


def draw_rows(count: int, size: int, seed: int) -> list[int]:
    """Draw rows without replacement; a smaller draw with the same seed is part of a larger one.

    Args:
        count: How many rows there are.
        size: How many are wanted; all, if there are fewer.
        seed: The seed.

    Returns:
        Their indices, in the order of the draw.
    """
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return order[:size]


def task_calibration(
    task: TaskExamples, tokenizer: PreTrainedTokenizerBase, *, max_length: int, examples: int, seed: int
) -> Calibration:
    """Tokenise a sample of the task as TRL does for training, for statistics of inputs and gradients.

    Args:
        task: Prompts and completions.
        tokenizer: The model's tokenizer; its end-of-text token closes each completion.
        max_length: Longer examples are cut to this many tokens.
        examples: How many examples are drawn.
        seed: Seed of the draw.

    Returns:
        The tokens, with the length of each prompt. Examples whose prompt fills ``max_length`` are left out.

    Raises:
        DataError: No example is left.
    """
    rows = draw_rows(len(task.prompts), examples, seed)
    end = tokenizer.eos_token or ""
    completions = [task.completions[i] + ("" if task.completions[i].endswith(end) else end) for i in rows]
    kept = tokenize_pairs([task.prompts[i] for i in rows], completions, tokenizer, max_length=max_length)
    if not kept:
        raise DataError(
            "task.train",
            got=f"{len(rows)} examples without a completion within {max_length} tokens",
            wanted="at least one",
            next_step="Raise task.calibration.max_length or shorten the prompts.",
        )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return Calibration(tuple(ids for ids, _ in kept), int(pad), tuple(start for _, start in kept))


def tokenize_pairs(
    prompts: Sequence[str], completions: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, max_length: int
) -> list[tuple[tuple[int, ...], int]]:
    """Tokenise each prompt with its completion as one text.

    Args:
        prompts: What the model reads.
        completions: What follows.
        tokenizer: The model's tokenizer.
        max_length: Longer texts are cut to this many tokens.

    Returns:
        Token ids and the number of leading ones that the prompt is, without the texts whose prompt leaves no room.
    """
    read = tokenizer(list(prompts))["input_ids"]
    whole = tokenizer([p + c for p, c in zip(prompts, completions, strict=True)])["input_ids"]
    cut = [(tuple(ids[:max_length]), _common(start, ids)) for start, ids in zip(read, whole, strict=True)]
    return [(ids, start) for ids, start in cut if start < len(ids)]


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Count equal leading tokens: a token may span the end of the prompt, and then it is learned."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
