"""Task data of a sequence classifier: texts, or pairs of texts, with a label or a score each."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from keeptune.core.artefact import content_key
from keeptune.core.errors import DataError
from keeptune.data.calibration import Calibration
from keeptune.data.completions import draw_rows
from keeptune.data.sources import Row
from keeptune.data.templates import pick, render

__all__ = [
    "Encoded",
    "LabelledExamples",
    "Texts",
    "classified_examples",
    "collator",
    "encode",
    "label_indices",
    "label_of",
    "labelled_calibration",
    "score_of",
    "scored_examples",
    "texts_of",
]


@dataclass(frozen=True, slots=True)
class Texts:
    """What a classifier reads.

    Args:
        first: The texts.
        second: The other texts of the pairs; None where there are no pairs.
    """

    first: tuple[str, ...]
    second: tuple[str, ...] | None = None

    @property
    def whole(self) -> list[str]:
        """Each example as one text, ended by NUL: a text that goes on after another's end does not start with it."""
        parts = [self.first] if self.second is None else [self.first, self.second]
        return ["\0".join(example) + "\0" for example in zip(*parts, strict=True)]


@dataclass(frozen=True, slots=True)
class Encoded:
    """Texts as a model reads them.

    Args:
        columns: ``input_ids``, ``attention_mask`` and what else the tokenizer gives, a list per example.
        cut: How many examples lost tokens to the limit.
    """

    columns: dict[str, list[list[int]]]
    cut: int

    def rows(self, indices: Sequence[int]) -> list[dict[str, list[int]]]:
        """Give some examples.

        Args:
            indices: Which.

        Returns:
            One mapping per example.
        """
        return [{name: column[index] for name, column in self.columns.items()} for index in indices]


@dataclass(frozen=True, slots=True)
class LabelledExamples:
    """Texts and what is to be told of them.

    Args:
        texts: The texts.
        labels: Index of the label per example, or the score.
        names: The labels, in the order of the head's outputs; empty where labels are scores.
    """

    texts: Texts
    labels: tuple[int, ...] | tuple[float, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        """Count the examples."""
        return len(self.labels)

    @property
    def fingerprint(self) -> str:
        """Content key of texts and labels, in order: training depends on it."""
        return content_key([self.texts, self.labels, self.names])

    def dataset(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[Dataset, int]:
        """Give the columns that ``Trainer`` reads.

        Args:
            tokenizer: The tokenizer.
            max_length: Tokens per example.

        Returns:
            The dataset, and how many examples were cut.
        """
        encoded = encode(tokenizer, self.texts, max_length)
        return Dataset.from_dict({**encoded.columns, "labels": list(self.labels)}), encoded.cut


def encode(tokenizer: PreTrainedTokenizerBase, texts: Texts, max_length: int) -> Encoded:
    """Tokenise texts with the special tokens of the tokenizer; of a pair, the longer text is cut first.

    Args:
        tokenizer: The tokenizer.
        texts: The texts.
        max_length: Tokens per example, special ones among them.

    Returns:
        The tokens.
    """
    parts = [list(part) for part in (texts.first, texts.second) if part is not None]
    # verbose=False: no warning about texts longer than the model, they are cut.
    lengths = [len(ids) for ids in tokenizer(*parts, verbose=False)["input_ids"]]
    columns = tokenizer(*parts, truncation=True, max_length=max_length)
    return Encoded(dict(columns), sum(length > max_length for length in lengths))


def labelled_calibration(
    task: LabelledExamples, tokenizer: PreTrainedTokenizerBase, *, max_length: int, examples: int, seed: int
) -> Calibration:
    """Tokenise a sample of the task as for training, for statistics of inputs and gradients.

    Args:
        task: Texts with labels or scores.
        tokenizer: The model's tokenizer.
        max_length: Longer examples are cut to this many tokens.
        examples: How many examples are drawn.
        seed: Seed of the draw.

    Returns:
        The tokens, with the label of each text.
    """
    drawn = draw_rows(len(task.labels), examples, seed)
    second = task.texts.second
    texts = Texts(tuple(task.texts.first[i] for i in drawn), second and tuple(second[i] for i in drawn))
    columns = encode(tokenizer, texts, max_length).columns
    types = columns.get("token_type_ids")
    return Calibration(
        tuple(map(tuple, columns["input_ids"])),
        int(tokenizer.pad_token_id or 0),
        labels=tuple(task.labels[i] for i in drawn),
        types=None if types is None else tuple(map(tuple, types)),
    )


def collator(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Make the function that pads a batch, on the right: an encoder reads its first token.

    Args:
        tokenizer: The tokenizer; it stays as it is.

    Returns:
        Mappings of examples to tensors.
    """
    own = copy.deepcopy(tokenizer)
    own.padding_side = "right"
    return DataCollatorWithPadding(own)


def texts_of(rows: Sequence[Row], *, text: str, text_pair: str | None, where: str) -> Texts:
    """Render the texts of rows.

    Args:
        rows: The rows.
        text: Template.
        text_pair: Template of the other text, for pairs.
        where: The recipe key, for error messages.

    Returns:
        The texts.

    Raises:
        DataError: A row lacks a field, or a text is empty.
    """
    parts = [_rendered(rows, template, where) for template in (text, text_pair) if template is not None]
    return Texts(*parts)


def _rendered(rows: Sequence[Row], template: str, where: str) -> tuple[str, ...]:
    texts = []
    for number, row in enumerate(rows, start=1):
        texts.append(render(template, row, where=f"{where} row {number}"))
        if not texts[-1].strip():
            raise DataError(
                f"{where} row {number}", got="an empty text", wanted="text", next_step="Fill the row or remove it."
            )
    return tuple(texts)


def classified_examples(
    rows: Sequence[Row],
    *,
    text: str,
    text_pair: str | None,
    label: str,
    names: Sequence[str] | None = None,
    where: str,
) -> LabelledExamples:
    """Render rows with a label each.

    Args:
        rows: The rows.
        text: Template.
        text_pair: Template of the other text, for pairs.
        label: Template of the label.
        names: All labels, in the order of the head's outputs; None collects them from the rows, sorted.
        where: The recipe key, for error messages.

    Returns:
        The examples.

    Raises:
        DataError: A row lacks a field, a text or a label is empty, a label is not among the names, or there
            are fewer than two labels.
    """
    found = [label_of(row, label, where=f"{where} row {number}") for number, row in enumerate(rows, start=1)]
    known = tuple(sorted(set(found)) if names is None else names)
    if len(known) < 2:
        raise DataError(
            where,
            got=f'one label only, "{known[0]}"',
            wanted="at least two labels to tell apart",
            next_step="Check task.label; for scores set `kind: regression`.",
        )
    return LabelledExamples(
        texts_of(rows, text=text, text_pair=text_pair, where=where), label_indices(found, known, where=where), known
    )


def label_indices(found: Sequence[str], known: Sequence[str], *, where: str) -> tuple[int, ...]:
    """Turn labels into indices.

    Args:
        found: A label per row.
        known: The labels of the head.
        where: The recipe key, for error messages.

    Returns:
        Their places among the known ones.

    Raises:
        DataError: One is not known.
    """
    index = {name: place for place, name in enumerate(known)}
    for number, name in enumerate(found, start=1):
        if name not in index:
            raise DataError(
                f"{where} row {number}",
                got=f'the label "{name}"',
                wanted=f"one of the labels that the model learns: {', '.join(known)}",
                next_step="Mend the row, or list all labels in task.labels.",
            )
    return tuple(index[name] for name in found)


def scored_examples(
    rows: Sequence[Row], *, text: str, text_pair: str | None, label: str, where: str
) -> LabelledExamples:
    """Render rows with a score each.

    Args:
        rows: The rows.
        text: Template.
        text_pair: Template of the other text, for pairs.
        label: Template of the score.
        where: The recipe key, for error messages.

    Returns:
        The examples.

    Raises:
        DataError: A row lacks a field, a text is empty, or a score is not a number.
    """
    scores = tuple(score_of(row, label, where=f"{where} row {number}") for number, row in enumerate(rows, start=1))
    return LabelledExamples(texts_of(rows, text=text, text_pair=text_pair, where=where), scores, ())


def label_of(row: Row, template: str, *, where: str) -> str:
    """Read the label of a row.

    Args:
        row: The row.
        template: Template of the label.
        where: File and row, for error messages.

    Returns:
        The label, without white space at its ends.

    Raises:
        DataError: The field is missing, or holds no label.
    """
    value = pick(template, row, where=where)
    if not isinstance(value, str | int | float) or not str(value).strip():
        raise DataError(
            where,
            got=f"the label {value!r}",
            wanted="a word or a number",
            next_step="Fill the row or remove it.",
        )
    return str(value).strip()


def score_of(row: Row, template: str, *, where: str) -> float:
    """Read the score of a row.

    Args:
        row: The row.
        template: Template of the score.
        where: File and row, for error messages.

    Returns:
        The score.

    Raises:
        DataError: The field is missing, or holds no finite number.
    """
    value = pick(template, row, where=where)
    try:
        number = math.nan if isinstance(value, bool) or value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise DataError(
            where,
            got=f"the score {value!r}",
            wanted="a number",
            next_step="Mend the row; for words as labels set `kind: classification`.",
        )
    return number
