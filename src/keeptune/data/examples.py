"""Examples of a task: rendered from rows, read by a trainer, sampled for statistics. The base class of all kinds."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from keeptune.data.calibration import Calibration


class Examples(ABC):
    """Examples of one kind of task.

    Laws: equal examples have equal fingerprints, and those of another order or text do not; the calibration of a
    smaller draw is part of a larger one.
    """

    __slots__ = ()

    @abstractmethod
    def __len__(self) -> int: ...

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """The content key of the examples, in order: training depends on it."""

    @property
    @abstractmethod
    def read_texts(self) -> Sequence[str]:
        """What the model reads of each example, to compare with what is scored (:mod:`keeptune.data.disjoint`)."""

    @abstractmethod
    def dataset(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[Dataset, int]:
        """Returns the columns that the trainer reads, and how many examples are cut to ``max_length`` tokens."""

    @abstractmethod
    def first_tokens(self, count: int, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Sequence[Sequence[int]]:
        """Returns the token ids of the first examples, cut to ``max_length`` tokens."""

    @abstractmethod
    def _calibration(self, rows: Sequence[int], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Calibration: ...

    def calibration(
        self, tokenizer: PreTrainedTokenizerBase, *, max_length: int, examples: int | None = None, seed: int = 0
    ) -> Calibration:
        """Returns a sample of some examples (None: all) as training tokenises it, with what is learned of it."""
        rows = draw_rows(len(self), len(self) if examples is None else examples, seed)
        return self._calibration(rows, tokenizer, max_length)


def draw_rows(count: int, size: int, seed: int) -> list[int]:
    """Returns the indices of ``size`` of ``count`` rows, drawn without replacement, in the order of the draw.

    Law: a smaller draw with the same seed is the beginning of a larger one.
    """
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return order[:size]
