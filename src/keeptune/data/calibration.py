"""Knowledge data for statistics: text to token batches with a mask, packed by length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from keeptune.core.artefact import content_key
from keeptune.core.errors import DataError

__all__ = ["Batch", "Calibration", "tokenize_calibration"]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Padded tokens and which of them are real.

    Args:
        input_ids: ``(batch, length)``, integer.
        attention_mask: ``(batch, length)``, 1 for a token, 0 for padding.
    """

    input_ids: Tensor
    attention_mask: Tensor


@dataclass(frozen=True, slots=True)
class Calibration:
    """Tokenised texts; their order and batching never change a statistic.

    Args:
        sequences: Token ids per text.
        pad_id: The id that fills up a batch; always masked.
    """

    sequences: tuple[tuple[int, ...], ...]
    pad_id: int

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return sum(map(len, self.sequences))

    @property
    def fingerprint(self) -> str:
        """Content key of the token ids, whatever their order."""
        return content_key(sorted(self.sequences))

    def batches(self, tokens: int = 4096, *, padding_side: str = "right") -> list[Batch]:
        """Form batches of about equal size from texts of about equal length.

        Args:
            tokens: Tokens per batch, padding included; a longer text is a batch of its own.
            padding_side: ``"right"`` or ``"left"``.

        Returns:
            The batches, longest texts first (memory problems show at once).
        """
        found: list[Batch] = []
        rows: list[tuple[int, ...]] = []
        for sequence in sorted(self.sequences, key=lambda s: (-len(s), s)):
            if rows and (len(rows) + 1) * len(rows[0]) > tokens:
                found.append(_pad(rows, self.pad_id, padding_side))
                rows = []
            rows.append(sequence)
        if rows:
            found.append(_pad(rows, self.pad_id, padding_side))
        return found


def _pad(rows: Sequence[tuple[int, ...]], pad_id: int, side: str) -> Batch:
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), pad_id)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for index, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        ids[index, place] = torch.tensor(row)
        mask[index, place] = 1
    return Batch(ids, mask)


def tokenize_calibration(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, max_length: int, where: str
) -> Calibration:
    """Tokenise knowledge texts as the model would read them.

    Args:
        texts: The texts.
        tokenizer: The model's tokenizer.
        max_length: Longer texts are cut to this many tokens.
        where: The recipe key, for error messages.

    Returns:
        The calibration data.

    Raises:
        DataError: There is no text, or a text has no tokens.
    """
    if not texts:
        raise DataError(where, got="no texts", wanted="at least one", next_step="Fill the knowledge file.")
    encoded = tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]
    for number, (text, ids) in enumerate(zip(texts, encoded, strict=True), start=1):
        if not ids or not text.strip():  # some tokenizers make a start token of nothing
            raise DataError(
                f"{where} example {number}",
                got="an empty text" if ids else "no tokens",
                wanted="a text that is not empty",
                next_step="Remove the row or change the template.",
            )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return Calibration(tuple(tuple(ids) for ids in encoded), int(pad))
