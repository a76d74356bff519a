"""Data for statistics: token batches with masks, packed by length."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from keeptune.core.artefact import content_key
from keeptune.core.errors import DataError
from keeptune.data.sources import refuse_empty

Learned = tuple[bool, ...]  # of each token of a text, whether it is learned
_Row = tuple[tuple[int, ...], Learned, float, tuple[int, ...]]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Padded tokens and which of them are real.

    Args:
        input_ids: ``(batch, length)``, integer.
        attention_mask: ``(batch, length)``, 1 for a token, 0 for padding.
        loss_mask: ``(batch, length)``, 1 for a token that the model learns to write; None without such a task.
        labels: ``(batch,)``, what a classifier learns of each text; None without such a task.
        token_type_ids: ``(batch, length)``, which text of a pair a token is from; None where models need not know.
    """

    input_ids: Tensor
    attention_mask: Tensor
    loss_mask: Tensor | None = None
    labels: Tensor | None = None
    token_type_ids: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Calibration:
    """Tokenised texts; their order and batching never change a statistic.

    Args:
        sequences: Token ids per text.
        pad_id: The id that fills up a batch; always masked.
        learned: Which tokens of each text the model learns to write; it only reads the rest. None without such a task.
        labels: Index of the label of each text, or its score. None without such a task.
        types: Which text of a pair each token is from. None where models need not know.
        sets: How many texts are of the first set, of the second and so on; empty where all are of one.
    """

    sequences: tuple[tuple[int, ...], ...]
    pad_id: int
    learned: tuple[Learned, ...] | None = None
    labels: tuple[int, ...] | tuple[float, ...] | None = None
    types: tuple[tuple[int, ...], ...] | None = None
    sets: tuple[int, ...] = ()

    @classmethod
    def of_answers(
        cls, sequences: Sequence[tuple[int, ...]], pad_id: int, prompts: Sequence[int], **fields: Any
    ) -> Calibration:
        """Returns texts whose first tokens, as many as ``prompts`` says of each, are read only."""
        learned = tuple(after(start, len(ids)) for ids, start in zip(sequences, prompts, strict=True))
        return cls(tuple(sequences), pad_id, learned, **fields)

    @property
    def tokens(self) -> int:
        """The number of tokens."""
        return sum(map(len, self.sequences))

    @property
    def learned_tokens(self) -> int:
        """The number of tokens that are learned, the first of a text never; of a classifier, of texts."""
        if self.labels is not None:
            return len(self.sequences)
        if self.learned is None:
            return sum(len(ids) - 1 for ids in self.sequences)
        return sum(sum(mask[1:]) for mask in self.learned)

    @property
    def prompts(self) -> tuple[int, ...] | None:
        """Tokens of each text before its last answer, the last stretch that is learned; None without such a task."""
        return None if self.learned is None else tuple(map(_last_answer, self.learned))

    def first(self, examples: int) -> Calibration:
        """Returns the first ``examples`` texts of each set; all of a set with fewer."""
        kept: list[int] = []
        end = 0
        for size in self.sets or (len(self.sequences),):
            kept += range(end, end + min(size, examples))
            end += size
        columns = {name: getattr(self, name) for name in ("sequences", "learned", "labels", "types")}
        taken: dict[str, Any] = {name: column and tuple(column[i] for i in kept) for name, column in columns.items()}
        return replace(self, **taken, sets=tuple(min(size, examples) for size in self.sets))

    @property
    def fingerprint(self) -> str:
        """The content key of the token ids and what is learned of them, whatever their order."""
        if self.learned is None and self.labels is None:
            return content_key(sorted(self.sequences))
        rows: list[Any] = []
        for ids, mask, label, types in self._rows():
            start = _last_answer(mask)
            whole = () if mask == after(start, len(ids)) else (mask,)  # several answers are written out
            rows.append((ids, start, label, types, *whole))
        return content_key([self.learned is None, self.types is None, sorted(rows)])

    def batches(self, tokens: int = 4096, *, padding_side: str = "right", padded: bool = True) -> list[Batch]:
        """Returns batches of about equal size, of texts of about equal length, longest first to show memory problems.

        Args:
            tokens: Tokens per batch, padding included; a longer text is a batch of its own.
            padding_side: ``"right"`` or ``"left"``.
            padded: False puts only texts of one length into a batch, so that no batch holds padding.
        """
        batches: list[Batch] = []
        rows: list[_Row] = []
        for row in sorted(self._rows(), key=lambda row: (-len(row[0]), row)):
            longest = len(rows[0][0]) if rows else 0
            if rows and ((len(rows) + 1) * longest > tokens or not (padded or len(row[0]) == longest)):
                batches.append(self._pad(rows, padding_side))
                rows = []
            rows.append(row)
        if rows:
            batches.append(self._pad(rows, padding_side))
        return batches

    def _rows(self) -> list[_Row]:
        count = len(self.sequences)
        whole = [after(0, len(ids)) for ids in self.sequences]
        parts = self.learned or whole, self.labels or [0] * count, self.types or [()] * count
        return list(zip(self.sequences, *parts, strict=True))

    def _pad(self, rows: Sequence[_Row], side: str) -> Batch:
        texts, learned, labels, types = zip(*rows, strict=True)

        def padded(parts: Iterable[Sequence[int]], fill: int = 0) -> Tensor:
            return pad_sequence([torch.tensor(part, dtype=torch.long) for part in parts], True, fill, side)

        return Batch(
            padded(texts, self.pad_id),
            padded([1] * len(ids) for ids in texts),
            loss_mask=None if self.learned is None else padded(learned),
            labels=None if self.labels is None else torch.tensor(labels),
            token_type_ids=None if self.types is None else padded(types),
        )


def after(prompt: int, length: int) -> Learned:
    """Returns the mask of a text of ``length`` tokens of which all after the first ``prompt`` are learned.

    >>> after(1, 3)
    (False, True, True)
    """
    return (False,) * prompt + (True,) * (length - prompt)


def _last_answer(mask: Learned) -> int:
    end = next((place for place in range(len(mask), 0, -1) if mask[place - 1]), len(mask))
    return next((place for place in range(end, 0, -1) if not mask[place - 1]), 0)


def once(tokenizer: PreTrainedTokenizerBase, rows: list[list[int]]) -> list[list[int]]:
    """Returns texts as tokens, given these.

    Law: a text that writes the token that the tokenizer begins, or ends, every text with has it once.
    """
    probe, start, end = tokenizer("a")["input_ids"], tokenizer.bos_token_id, tokenizer.eos_token_id
    if probe[:1] == [start]:
        rows = [ids[1:] if ids[:2] == [start, start] else ids for ids in rows]
    return [ids[:-1] if ids[-2:] == [end, end] else ids for ids in rows] if probe[-1:] == [end] else rows


def tokenize_calibration(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, max_length: int, where: str
) -> Calibration:
    """Tokenises whole texts, cut to ``max_length``; a DataError says that there is none, or one is empty."""
    if not texts:
        raise DataError(where, got="no texts", wanted="at least one", next_step="Fill the knowledge file.")
    rows = once(tokenizer, tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"])
    # Some tokenizers make a start token of nothing, and some no token of a text.
    refuse_empty((text if ids else "" for text, ids in zip(texts, rows, strict=True)), where, unit="example")
    return Calibration(tuple(map(tuple, rows)), pad_id_of(tokenizer))


def pad_id_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the id that fills up batches, which is always masked; 0 where the tokenizer has none."""
    return int(tokenizer.pad_token_id or 0)
