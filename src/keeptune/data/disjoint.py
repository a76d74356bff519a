"""Evaluation data must be disjoint from what was used to prepare and to train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from keeptune.core.artefact import canonical_json
from keeptune.core.errors import DataError
from keeptune.data.sources import Row


@dataclass(frozen=True, slots=True)
class Corpus:
    """Rows of a data file, named by the recipe key ``where``, and the text that the model reads of each.

    That is the whole text, or the prompt of an evaluation item; with a NUL at its end it overlaps an equal text only.
    """

    where: str
    rows: Sequence[Row]
    texts: Sequence[str]


def refuse_overlap(used: Corpus, scored: Corpus) -> None:
    """Raises DataError where an evaluation item is among the data that were used, and shows the first.

    An item overlaps when its row is one of the used rows, or a used text starts with the item's prompt
    (case and white space aside).
    """
    rows = {canonical_json(row) for row in used.rows}
    lengths = {len(_plain(text)) for text in scored.texts}
    starts = {text[:length] for text in map(_plain, used.texts) for length in lengths if length <= len(text)}
    common = [
        (number, text)
        for number, (row, text) in enumerate(zip(scored.rows, scored.texts, strict=True), start=1)
        if canonical_json(row) in rows or _plain(text) in starts
    ]
    if common:
        number, text = common[0][0], common[0][1].strip("\0")
        raise DataError(
            scored.where,
            got=f"{len(common)} of {len(scored.rows)} items that are in {used.where} too (row {number}: {text[:60]!r})",
            wanted="disjoint data",
            next_step="Split the file: what is measured may be neither calibrated nor trained on.",
        )


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
