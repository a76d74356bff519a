"""Texts that a model wrote itself, as knowledge, and which of them are of use."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from keeptune.core.artefact import content_key
from keeptune.data.calibration import after
from keeptune.data.examples import LanguageExamples, TokenRow, Truncate


class Written(NamedTuple):
    """A text as it was written.

    Args:
        ids: Its tokens; none where the model has no room for it.
        start: How many of them were only read.
        prompt: What was read, without a chat's template; empty for a text from the first token on.
        completion: What was written.
    """

    ids: tuple[int, ...]
    start: int
    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class SelfWritten(LanguageExamples):
    """Texts of a model as knowledge: what it wrote is learned, with an end where it ended; what it read is not.

    Args:
        texts: Those that are of use.
        left_out: How many are not, by reason.
        where: The recipe key.
    """

    texts: tuple[Written, ...]
    left_out: Mapping[str, int] = field(default_factory=dict)
    where: str = "knowledge"
    truncate: Truncate = "right"

    def __len__(self) -> int:
        return len(self.texts)

    @property
    def fingerprint(self) -> str:
        """The content key of the tokens."""
        return content_key([[text.ids, text.start] for text in self.texts])

    @property
    def read_texts(self) -> Sequence[str]:
        """Prompts and completions, each in lines of its own."""
        return [f"{text.prompt}\n{text.completion}".strip() for text in self.texts]

    @property
    def account(self) -> str:
        """How many texts of how many tokens there are, and what was left out."""
        tokens = sum(len(text.ids) - text.start for text in self.texts)
        gone = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())
        return f"{len(self)} texts, {tokens:,} tokens, that the base wrote" + (f"; left out: {gone}" if gone else "")

    def token_rows(self, tokenizer: PreTrainedTokenizerBase, rows: Sequence[int] | None = None) -> list[TokenRow]:
        """Returns the tokens as they were written."""
        chosen = self.texts if rows is None else [self.texts[row] for row in rows]
        return [TokenRow(text.ids, after(text.start, len(text.ids))) for text in chosen]

    def without(self, faults: Mapping[int, str]) -> SelfWritten:
        """Returns the set without some texts, whose reasons are counted."""
        kept = tuple(text for row, text in enumerate(self.texts) if row not in faults)
        return replace(self, texts=kept, left_out=Counter(self.left_out) + Counter(faults.values()))


def useful(texts: Iterable[Written], where: str) -> SelfWritten:
    """Returns the texts that are of use, in order; of equal ones the first."""
    found = SelfWritten(tuple(texts), where=where)
    seen: set[str] = set()
    faults: dict[int, str] = {}
    for row, (text, read) in enumerate(zip(found.texts, found.read_texts, strict=True)):
        plain = " ".join(read.lower().split())
        if reason := fault(text) or ("written before" if plain in seen else None):
            faults[row] = reason
        seen.add(plain)
    return found.without(faults)


def fault(text: Written) -> str | None:
    """Returns why a text is of no use by itself.

    It repeats itself where of 24 tokens or more less than 0.4 of all runs of three are different, or where zlib makes
    less than 0.3 of 100 bytes or more (of 300 texts of C4 that is so of one).

    >>> fault(Written((1, *range(30)), 1, "", "no no no " * 20))
    'repeating themselves'
    """
    if not text.ids:
        return "with a prompt too long"
    if not text.completion.strip():
        return "empty"
    new, raw = text.ids[text.start :], text.completion.encode()
    runs = list(zip(new, new[1:], new[2:], strict=False))
    repeated = len(new) >= 24 and len(set(runs)) < 0.4 * len(runs)
    packed = len(raw) >= 100 and len(zlib.compress(raw, 9)) < 0.3 * len(raw)
    return "repeating themselves" if repeated or packed else None
