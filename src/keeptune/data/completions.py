"""Prompts with completions, for TRL and for statistics; the loss is taken on the completions only."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from keeptune.core.artefact import content_key
from keeptune.core.errors import DataError
from keeptune.data.calibration import Calibration, pad_id_of, tokenize_calibration
from keeptune.data.examples import Examples
from keeptune.data.sources import Row
from keeptune.data.templates import render_all

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TaskExamples(Examples):
    """Rendered prompts, and the completions that a model learns to write; TRL appends the end-of-text token."""

    prompts: tuple[str, ...]
    completions: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def fingerprint(self) -> str:
        """The content key of the texts."""
        return content_key([self.prompts, self.completions])

    @property
    def read_texts(self) -> Sequence[str]:
        """The prompts."""
        return self.prompts

    def dataset(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[Dataset, int]:
        """Returns the columns ``prompt`` and ``completion``; ``SFTTrainer`` tokenises and cuts them itself."""
        return Dataset.from_dict({"prompt": list(self.prompts), "completion": list(self.completions)}), 0

    def first_tokens(self, count: int, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Sequence[Sequence[int]]:
        """Returns the token ids of the first prompts with their completions."""
        texts = [p + c for p, c in zip(self.prompts[:count], self.completions[:count], strict=True)]
        return tokenize_calibration(texts, tokenizer, max_length=max_length, where="task.train").sequences

    def _calibration(self, rows: Sequence[int], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Calibration:
        end = tokenizer.eos_token or ""
        completions = [self.completions[i] + ("" if self.completions[i].endswith(end) else end) for i in rows]
        return tokenize_completions(
            [self.prompts[i] for i in rows],
            completions,
            tokenizer,
            max_length=max_length,
            where="task.train",
            setting="task.calibration.max_length",
        )


def task_examples(rows: Sequence[Row], *, prompt: str, completion: str, where: str) -> TaskExamples:
    """Renders the rows of a task by the templates of prompts and of completions, usually starting with a space.

    Raises:
        DataError: A template does not fit the rows, or every completion is empty.
    """
    examples = TaskExamples(render_all(prompt, rows, where=where), render_all(completion, rows, where=where))
    empty = [number for number, text in enumerate(examples.completions, start=1) if not text.strip()]
    if len(empty) == len(rows):
        raise DataError(
            where,
            got=f"{len(rows)} rows, all with empty completions",
            wanted="completions to learn",
            next_step="Check the template task.completion and the field that it names.",
        )
    if empty:
        some = ", ".join(map(str, empty[:5])) + (", ..." if len(empty) > 5 else "")
        _log.warning(
            "%s: %d of %d completions are empty: only their end is learned (rows %s)",
            where,
            len(empty),
            len(rows),
            some,
        )
    return examples


def tokenize_completions(
    prompts: Sequence[str],
    completions: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    where: str,
    setting: str = "max_length",
) -> Calibration:
    """Tokenises each prompt with its completion as one text, cut to ``max_length``; prompts that fill it are left out.

    Raises:
        DataError: No example of ``where``, a recipe key, is left; ``setting`` is the one that could be raised.
    """
    read = tokenizer(list(prompts))["input_ids"]
    whole = tokenizer([p + c for p, c in zip(prompts, completions, strict=True)])["input_ids"]
    cut = [(tuple(ids[:max_length]), _common(start, ids)) for start, ids in zip(read, whole, strict=True)]
    kept = [(ids, start) for ids, start in cut if start < len(ids)]
    if not kept:
        raise DataError(
            where,
            got=f"{len(completions)} examples without a completion within {max_length} tokens",
            wanted="at least one",
            next_step=f"Raise {setting} or shorten the prompts.",
        )
    return Calibration(tuple(ids for ids, _ in kept), pad_id_of(tokenizer), tuple(start for _, start in kept))


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Count equal leading tokens: a token may span the end of the prompt, and then it is learned."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
