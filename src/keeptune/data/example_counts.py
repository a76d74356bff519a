"""What is learned of training data: examples as the model sees them, counted, with those that teach nothing named."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase

from keeptune.data.examples import LEFT_OUT, LanguageExamples, Lost, TokenRow, labels_of

Marked = list[tuple[str, bool]]  # stretches of a text, and whether they are learned
_SHORT = 16  # learned tokens, up to which an answer is looked at for being empty


def data_account(
    examples: LanguageExamples, tokenizer: PreTrainedTokenizerBase, max_length: int | None, *, show: int = 3
) -> tuple[dict[str, Any], list[TokenRow]]:
    """Returns the account of what is trained on, and its tokens.

    The account has the number of ``examples`` given and of those ``kept``, their ``tokens``, those ``learned``, and
    ``lengths``: ``shortest``, ``median``, ``longest``. ``lost`` names what is not learned as it stands, ``noted`` what
    may be a mistake: what is wrong, to numbers of examples from 1. ``shown`` are the first examples as :func:`marked`.

    Args:
        examples: What is trained on.
        tokenizer: The model's.
        max_length: Tokens that an example is cut to; None for none.
        show: How many examples are written out.

    Raises:
        DataError: Nothing is left to learn.
    """
    rows, lost = examples.fitted(tokenizer, max_length)
    lengths = [len(row.ids) for row in rows]
    out = {number for reason, numbers in lost.items() if reason.startswith(LEFT_OUT) for number in numbers}
    numbers = [number for number in range(1, len(examples) + 1) if number not in out]
    account = {
        "examples": len(examples),
        "kept": len(rows),
        "tokens": sum(lengths),
        "learned": sum(label != -100 for row in rows for label in labels_of(row)),
        "lengths": {"shortest": min(lengths), "median": statistics.median(lengths), "longest": max(lengths)},
        "lost": lost,
        "noted": _noted(dict(zip(numbers, rows, strict=True)), tokenizer),
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
