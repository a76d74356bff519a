"""Examples of a task: rendered from rows, read by a trainer, sampled for statistics, counted. Base classes of all."""

from __future__ import annotations

import logging
import statistics
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from keeptune.core.artefact import content_key
from keeptune.core.errors import DataError
from keeptune.data.calibration import Calibration, Learned, pad_id_of

_log = logging.getLogger(__name__)
Truncate = Literal["right", "left", "drop"]


# What of the examples is not learned as it stands: what is wrong, to their numbers from 1.
Lost = Mapping[str, Sequence[int]]
LEFT_OUT: Final = "left out"  # the beginning of what is wrong with those that are not trained on


class TokenRow(NamedTuple):
    """An example as the model sees it.

    Args:
        ids: Its tokens.
        learned: Which of them are learned.
        lost: Of a conversation, why a message that is to be learned is not, for each such message.
    """

    ids: tuple[int, ...]
    learned: Learned
    lost: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages as chat templates take them, plain JSON objects.

    Args:
        messages: Each with ``role`` and ``content`` (text, or None beside ``tool_calls``); optional are ``tool_calls``,
            ``name``, ``tool_call_id``, ``reasoning_content``, and ``train``: False where a message is not learned.
        tools: JSON schemas of the functions that the model may call.
    """

    messages: tuple[Mapping[str, Any], ...]
    tools: tuple[Mapping[str, Any], ...] | None = None


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
        """What the model reads of each example, to compare with what is scored."""

    @abstractmethod
    def dataset(self, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> tuple[Dataset, Lost]:
        """Returns the columns that the trainer reads, of examples cut to ``max_length`` tokens, and what is lost."""

    @abstractmethod
    def first_tokens(self, count: int, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Sequence[Sequence[int]]:
        """Returns the token ids of the first examples, cut to ``max_length`` tokens."""

    @abstractmethod
    def _calibration(self, rows: Sequence[int], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Calibration: ...

    def calibration(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        examples: int | None = None,
        seed: int | None = None,
    ) -> Calibration:
        """Returns some examples (None: all) as training tokenises them, drawn; without a seed the first, in order."""
        order = range(len(self)) if seed is None else draw_rows(len(self), len(self), seed)
        rows = order[: len(self) if examples is None else examples]
        return self._calibration(rows, tokenizer, max_length)


class LanguageExamples(Examples):
    """Examples of a language model; knowledge sets are such examples too.

    Laws: what a trainer learns of an example is what :meth:`token_rows` says, as far as it has room; statistics see the
    same tokens.
    """

    __slots__ = ()
    where: str
    truncate: Truncate

    @abstractmethod
    def token_rows(self, tokenizer: PreTrainedTokenizerBase, rows: Sequence[int] | None = None) -> list[TokenRow]:
        """Returns examples by their indices (None: all) as tokens, at their whole length."""

    def fitted(self, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> tuple[list[TokenRow], Lost]:
        """Returns the tokens of all examples within a length, and what is lost; nothing left raises DataError."""
        return fit(self.token_rows(tokenizer), max_length, self.truncate, where=self.where)

    def dataset(self, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> tuple[Dataset, Lost]:
        """Returns ``input_ids`` and ``labels`` (-100 where nothing is learned), and what is lost."""
        rows, lost = self.fitted(tokenizer, max_length)
        return Dataset.from_dict(
            {"input_ids": [list(row.ids) for row in rows], "labels": list(map(labels_of, rows))}
        ), lost

    def first_tokens(self, count: int, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Sequence[Sequence[int]]:
        """Returns the token ids of the first examples, cut to ``max_length`` tokens."""
        return [row.ids[:max_length] for row in self.token_rows(tokenizer, range(min(count, len(self))))]

    def _calibration(self, rows: Sequence[int], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Calibration:
        place = "task.calibration" if self.where.startswith("task") else self.where
        key = "--max-length" if place.startswith("--") else f"{place}.max_length"
        found = fit(self.token_rows(tokenizer, rows), max_length, self.truncate, where=self.where, key=key)[0]
        if len(found) < len(rows):
            _log.warning(
                "%s: %d examples have nothing to learn within %d tokens and are left out",
                *(self.where, len(rows) - len(found), max_length),
            )
        return Calibration(tuple(row.ids for row in found), pad_id_of(tokenizer), tuple(row.learned for row in found))


@dataclass(frozen=True, slots=True)
class Mixed(LanguageExamples):
    """Examples of several kinds in one order: of each of the whole, its part and its index there."""

    parts: tuple[LanguageExamples, ...]
    order: tuple[tuple[int, int], ...]

    @property
    def where(self) -> str:  # type: ignore[override]
        """The first part's place in the recipe."""
        return self.parts[0].where

    @property
    def truncate(self) -> Truncate:  # type: ignore[override]
        """As the first part is cut."""
        return self.parts[0].truncate

    def __len__(self) -> int:
        return len(self.order)

    @property
    def fingerprint(self) -> str:
        """The content key of the parts and the order."""
        return content_key([[part.fingerprint for part in self.parts], self.order])

    @property
    def read_texts(self) -> Sequence[str]:
        """The texts of the parts."""
        texts = [part.read_texts for part in self.parts]
        return [texts[part][row] for part, row in self.order]

    def token_rows(self, tokenizer: PreTrainedTokenizerBase, rows: Sequence[int] | None = None) -> list[TokenRow]:
        """Returns examples of the whole as their parts give them."""
        wanted = self.order if rows is None else [self.order[row] for row in rows]
        found: dict[tuple[int, int], TokenRow] = {}
        for number, part in enumerate(self.parts):
            own = sorted({row for at, row in wanted if at == number})
            found |= {(number, row): tokens for row, tokens in zip(own, part.token_rows(tokenizer, own), strict=True)}
        return [found[place] for place in wanted]


def labels_of(row: TokenRow) -> list[int]:
    """Returns the labels of an example as Transformers' losses take them: -100 where nothing is learned.

    The first token is never learned, and so does not count among those that a loss is the mean of.

    >>> labels_of(TokenRow((7, 8, 9), (True, True, False)))
    [-100, 8, -100]
    """
    learned = (False, *row.learned[1:])
    return [token if own else -100 for token, own in zip(row.ids, learned, strict=True)]


def fit(
    rows: Sequence[TokenRow], max_length: int | None, truncate: Truncate, *, where: str, key: str = "train.max_length"
) -> tuple[list[TokenRow], Lost]:
    """Cuts examples to a length, and leaves out those of which nothing is learned.

    One that is too long loses its right or its left end, or is left out, as ``truncate`` says.

    Returns:
        The examples that teach, and what is lost.

    Raises:
        DataError: Nothing is left.
    """
    kept, lost = [], dict[str, list[int]]()
    for number, row in enumerate(rows, start=1):
        long = max_length is not None and len(row.ids) > max_length
        cut = row
        if long:
            part = slice(-(max_length or 0), None) if truncate == "left" else slice(max_length)
            cut = TokenRow(row.ids[part], row.learned[part])
        # The first token of a text is never learned: nothing comes before it.
        if not any(row.learned[1:]):
            lost.setdefault(f"{LEFT_OUT}: nothing in them is learned", []).append(number)
        elif not any(cut.learned[1:]) or (long and truncate == "drop"):
            reason = "longer" if truncate == "drop" else "nothing to learn"
            lost.setdefault(f"{LEFT_OUT}: {reason} within {max_length} tokens", []).append(number)
        else:
            kept.append(cut)
            if long:
                lost.setdefault(f"cut to {max_length} tokens", []).append(number)
    if not kept:
        raise DataError(
            where,
            got=f"{len(rows)} examples, all " + "; ".join(f"{reason} ({len(n)})" for reason, n in lost.items()),
            wanted="at least one with something to learn",
            next_step=f"Raise {key} ({max_length}), shorten the prompts, or check what the rows hold.",
        )
    return kept, lost


def kept_numbers(count: int, lost: Lost) -> list[int]:
    """Returns the numbers, from 1, of the examples that are not left out."""
    out = {number for reason, numbers in lost.items() if reason.startswith(LEFT_OUT) for number in numbers}
    return [number for number in range(1, count + 1) if number not in out]


def draw_rows(count: int, size: int, seed: int) -> list[int]:
    """Returns the indices of ``size`` of ``count`` rows, drawn without replacement, in the order of the draw.

    Law: a smaller draw with the same seed is the beginning of a larger one.
    """
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return order[:size]


Marked = list[tuple[str, bool]]  # stretches of a text, and whether they are learned
_SHORT = 16  # learned tokens, up to which an answer is looked at for being empty


def data_account(
    examples: LanguageExamples, tokenizer: PreTrainedTokenizerBase, max_length: int | None, *, show: int = 3
) -> tuple[dict[str, Any], list[TokenRow]]:
    """Returns the account of what is trained on, and its tokens.

    The account has the number of ``examples`` given and of those ``kept``, their ``tokens``, those ``learned``, and
    ``lengths``: ``shortest``, ``median``, ``longest``. ``lost`` names what is not learned as it stands, ``noted`` what
    may be a mistake: what is wrong, to numbers of examples from 1. ``shown`` are the first ones as :func:`marked`.

    Raises:
        DataError: Nothing is left to learn within ``max_length`` tokens.
    """
    rows, lost = examples.fitted(tokenizer, max_length)
    lengths = [len(row.ids) for row in rows]
    account = {
        "examples": len(examples),
        "kept": len(rows),
        "tokens": sum(lengths),
        "learned": sum(label != -100 for row in rows for label in labels_of(row)),
        "lengths": {"shortest": min(lengths), "median": statistics.median(lengths), "longest": max(lengths)},
        "lost": lost,
        "noted": _noted(dict(zip(kept_numbers(len(examples), lost), rows, strict=True)), tokenizer),
        "shown": [marked(row, tokenizer) for row in rows[:show]],
    }
    return account, rows


def shortened(account: Mapping[str, Any], most: int = 20) -> dict[str, Any]:
    """Returns an account with the first ``most`` numbers of each reason, and their count."""
    reasons = {
        name: {why: {"count": len(rows), "first": list(rows[:most])} for why, rows in account[name].items()}
        for name in ("lost", "noted")
    }
    return {**account, **reasons}


def marked(row: TokenRow, tokenizer: PreTrainedTokenizerBase) -> Marked:
    """Returns an example as stretches of text that are read or learned; together they are the whole text.

    A stretch is what the text grows by: a token alone may be half a character, or have lost the space before it.
    """
    parts: Marked = []
    start = before = 0
    text = ""
    for end in range(1, len(row.ids) + 1):
        if end < len(row.ids) and row.learned[end] == row.learned[start]:
            continue
        text = tokenizer.decode(row.ids[:end], clean_up_tokenization_spaces=False)
        parts.append((text[before:], row.learned[start]))
        start, before = end, len(text)
    return parts


def _noted(rows: Mapping[int, TokenRow], tokenizer: PreTrainedTokenizerBase) -> Lost:
    """Returns which kept examples say again what one before them says, and which have nothing but an end to learn."""
    seen: set[TokenRow] = set()
    again, empty = [], []
    for number, row in rows.items():
        if row in seen:
            again.append(number)
        seen.add(row)
        answer = [label for label in labels_of(row) if label != -100]
        if len(answer) <= _SHORT and not tokenizer.decode(answer, skip_special_tokens=True).strip():
            empty.append(number)
    found = {"equal to an example before them": again, "answers without a word: only their end is learned": empty}
    return {reason: numbers for reason, numbers in found.items() if numbers}
