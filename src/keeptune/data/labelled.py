"""Rows with right answers: texts, or pairs, with a label or a score each; and questions with choices, as prompts."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from keeptune.core.artefact import content_key
from keeptune.core.errors import DataError, need_known
from keeptune.data.calibration import Calibration, pad_id_of
from keeptune.data.examples import Examples, Lost, draw_rows
from keeptune.data.sources import Row, pick, refuse_empty, render_all, text_of


@dataclass(frozen=True, slots=True)
class Texts:
    """What a classifier reads: texts, or pairs of texts."""

    first: tuple[str, ...]
    second: tuple[str, ...] | None = None

    @property
    def whole(self) -> list[str]:
        """Each example as one text, ended by NUL: a text that goes on after another's end does not start with it."""
        return ["\0".join(example) + "\0" for example in zip(*self._parts(), strict=True)]

    def take(self, indices: Sequence[int]) -> Texts:
        """Returns some examples."""
        return Texts(*(tuple(part[i] for i in indices) for part in self._parts()))

    def encode(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> tuple[Dataset, tuple[int, ...]]:
        """Returns what the tokenizer gives, special tokens with it, and which examples it cuts, from 1.

        Of a pair, the longer text is cut first.
        """
        parts = [list(part) for part in self._parts()]
        # verbose=False: no warning about texts longer than the model, they are cut.
        whole = tokenizer(*parts, verbose=False)["input_ids"]
        columns = tokenizer(*parts, truncation=True, max_length=max_length)
        return Dataset.from_dict(columns), tuple(n for n, ids in enumerate(whole, start=1) if len(ids) > max_length)

    def _parts(self) -> list[tuple[str, ...]]:
        return [self.first] if self.second is None else [self.first, self.second]


@dataclass(frozen=True, slots=True)
class LabelledExamples(Examples):
    """Texts with labels or scores.

    Args:
        texts: The texts.
        labels: Index of the label per example, or the score.
        names: The labels, in the order of the head's outputs; empty where labels are scores.
    """

    texts: Texts
    labels: tuple[int, ...] | tuple[float, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def fingerprint(self) -> str:
        """The content key of texts and labels."""
        return content_key([self.texts, self.labels, self.names])

    @property
    def read_texts(self) -> Sequence[str]:
        """Each text, or pair of texts, as one."""
        return self.texts.whole

    def dataset(self, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> tuple[Dataset, Lost]:
        """Returns the tokens and ``labels``, and which texts are cut."""
        data, cut = self.texts.encode(tokenizer, max_length or 0)
        return data.add_column("labels", list(self.labels)), {f"cut to {max_length} tokens": cut} if cut else {}

    def first_tokens(self, count: int, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Sequence[Sequence[int]]:
        """Returns the token ids of the first texts."""
        return list(self.texts.take(range(min(count, len(self)))).encode(tokenizer, max_length)[0]["input_ids"])

    def _calibration(self, rows: Sequence[int], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Calibration:
        columns = self.texts.take(rows).encode(tokenizer, max_length)[0].to_dict()
        types = columns.get("token_type_ids")
        return Calibration(
            tuple(map(tuple, columns["input_ids"])),
            pad_id_of(tokenizer),
            labels=tuple(self.labels[i] for i in rows),
            types=None if types is None else tuple(map(tuple, types)),
        )


def collator(tokenizer: PreTrainedTokenizerBase) -> Any:
    """Returns the function that pads a batch on the right, where an encoder reads the first token."""
    own = copy.deepcopy(tokenizer)
    own.padding_side = "right"
    return DataCollatorWithPadding(own)


def texts_of(rows: Sequence[Row], *, text: str, text_pair: str | None, where: str) -> Texts:
    """Renders the texts of rows, or their pairs; an empty one raises DataError."""
    texts = Texts(*(render_all(template, rows, where=where) for template in (text, text_pair) if template is not None))
    for part in texts._parts():
        refuse_empty(part, where)
    return texts


def labelled_examples(
    rows: Sequence[Row],
    *,
    text: str,
    text_pair: str | None,
    label: str,
    names: Sequence[str] | None = None,
    scores: bool = False,
    where: str,
) -> LabelledExamples:
    """Renders rows with a label or a score each, by templates.

    ``names`` are all labels, in the order of the head's outputs; None collects them from the rows, sorted.

    Raises:
        DataError: A field is missing, empty, no number or not among the names, or there are fewer than two labels.
    """
    places = [(row, f"{where} row {number}") for number, row in enumerate(rows, start=1)]
    labels: tuple[int, ...] | tuple[float, ...]
    known: tuple[str, ...] = ()
    if scores:
        labels = tuple(score_of(row, label, where=place) for row, place in places)
    else:
        words = [label_of(row, label, where=place) for row, place in places]
        known = tuple(sorted(set(words)) if names is None else names)
        if len(known) < 2:
            raise DataError(
                where,
                got=f'one label only, "{known[0]}"',
                wanted="at least two labels",
                next_step="Check task.label; for scores set `kind: regression`.",
            )
        labels = label_indices(words, known, where=where)
    return LabelledExamples(texts_of(rows, text=text, text_pair=text_pair, where=where), labels, known)


def label_indices(labels: Sequence[str], known: Sequence[str], *, where: str) -> tuple[int, ...]:
    """Returns the places of labels among the known ones; others raise DataError."""
    index = {name: place for place, name in enumerate(known)}
    for number, name in enumerate(labels, start=1):
        need_known(name, index, f"{where} row {number}", "a label that the model learns (task.labels)", DataError)
    return tuple(index[name] for name in labels)


def label_of(row: Row, template: str, *, where: str) -> str:
    """Returns the label of a row, without white space at its ends; a DataError says that it holds none."""
    label = text_of(pick(template, row, where=where), where=f"{where}, label").strip()
    if not label:
        next_step = "Fill the row or remove it."
        raise DataError(where, got="an empty label", wanted="a word or a number", next_step=next_step)
    return label


def score_of(row: Row, template: str, *, where: str) -> float:
    """Returns the score of a row; a DataError says that it holds no finite number."""
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
            next_step="Correct the row; for words as labels set `kind: classification`.",
        )
    return number


# LoKI's, on MMLU (its releases end it with a space and a line break).
LOKI_PROMPT = (
    "There is a single choice question about {subject_title}. Answer the question by replying {letters}.\n"
    "Question: {question}\nChoices:\n{options}\nAnswer: \n"
)
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def choose_rows(rows: Sequence[Row], count: int, *, by: str | None, seed: int | None, where: str) -> list[Row]:
    """Returns ``count`` rows of the file, or of each value of a field such as ``subject``, in file order.

    All, where there are fewer; else the first, or those that a seed draws: a smaller draw is part of a larger one.
    """
    groups: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        place = f"{where} row {index + 1}"
        value = "" if by is None else text_of(pick(f"{{{by}}}", row, where=place), where=place)
        groups.setdefault(value, []).append(index)
    kept: list[int] = []
    for members in groups.values():
        kept += members[:count] if seed is None else [members[i] for i in draw_rows(len(members), count, seed)]
    return [rows[index] for index in sorted(kept)]


def lettered_rows(rows: Sequence[Row], choices: str, *, where: str) -> list[Row]:
    r"""Returns rows with the fields that prompts of questions with choices name, before their own of these names.

    ``options`` are the choices, each after its letter, a line each; ``letters`` names the letters; ``letter`` is that
    of the right choice, from the field ``answer`` (a letter, an index from 0, or the choice itself); ``subject_title``
    is ``subject`` as a title. ``choices`` names the field that holds the list of choices.

    Raises:
        DataError: A row has no list of choices, or an answer that is none of them.

    >>> row = {"choices": ["one", "two"], "answer": 1, "subject": "abstract_algebra"}
    >>> made = lettered_rows([row], "{choices}", where="x")[0]
    >>> made["options"], made["letters"], made["letter"], made["subject_title"]
    ('A. one\nB. two', 'A or B', 'B', 'Abstract Algebra')
    """
    return [_lettered(row, choices, f"{where} row {number}") for number, row in enumerate(rows, start=1)]


def _lettered(row: Row, choices: str, where: str) -> Row:
    listed = pick(choices, row, where=where)
    if not isinstance(listed, list) or not 2 <= len(listed) <= len(_LETTERS):
        raise DataError(
            f"{where} choices",
            got=f"{listed!r}",
            wanted="a list of 2 to 26 choices",
            next_step='Name the field that holds them, alone: choices: "{choices}".',
        )
    texts, letters = [text_of(choice, where=f"{where} choices") for choice in listed], _LETTERS[: len(listed)]
    more: dict[str, Any] = {
        "options": "\n".join(f"{letter}. {text}" for letter, text in zip(letters, texts, strict=True)),
        "letters": f"{', '.join(letters[:-1])} or {letters[-1]}",
    }
    if "answer" in row:
        more["letter"] = _right(row["answer"], texts, letters, where)
    if "subject" in row:
        more["subject_title"] = text_of(row["subject"], where=f"{where} subject").replace("_", " ").title()
    return {**row, **more}


def _right(answer: Any, texts: Sequence[str], letters: str, where: str) -> str:
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(letters):
        return letters[answer]
    if isinstance(answer, str) and len(answer) == 1 and answer in letters:
        return answer
    if isinstance(answer, str) and texts.count(answer) == 1:
        return letters[texts.index(answer)]
    raise DataError(
        f"{where} answer",
        got=f"{answer!r}",
        wanted=f"one of {letters}, an index from 0 to {len(letters) - 1}, or one of the choices",
        next_step="Correct the row, or give `prompt` and `completion` of your own.",
    )
