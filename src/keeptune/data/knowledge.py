"""Knowledge data: sets of examples that a model is to keep, joined into one calibration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from keeptune.core.errors import DataError
from keeptune.data.calibration import Calibration, after
from keeptune.data.completions import TaskExamples
from keeptune.data.examples import LanguageExamples
from keeptune.data.sources import Row
from keeptune.data.templates import render_all

Knowledge = LanguageExamples | Sequence[str] | Sequence[tuple[str, str]]


def knowledge_set(
    rows: Sequence[Row],
    *,
    text: str | None = None,
    prompt: str | None = None,
    completion: str | None = None,
    chat: bool = False,
    where: str,
) -> TaskExamples:
    """Renders the rows of a set by the template of whole texts, or else those of prompts and completions.

    Raises:
        DataError: A template does not fit the rows, or a completion is empty.
    """
    if text is not None:
        return TaskExamples(None, render_all(text, rows, where=where), end=False, where=where)
    completions = render_all(completion or "", rows, where=where)
    refuse_empty(completions, where)
    return TaskExamples(render_all(prompt or "", rows, where=where), completions, end=False, chat=chat, where=where)


def knowledge_of(examples: Knowledge, where: str = "knowledge") -> LanguageExamples:
    """Returns a set of texts, or of pairs of a prompt and its completion; both together raise DataError."""
    if isinstance(examples, LanguageExamples):
        return examples
    texts = tuple(example for example in examples if isinstance(example, str))
    pairs = [example for example in examples if not isinstance(example, str)]
    if texts and pairs or any(len(pair) != 2 for pair in pairs):
        raise DataError(
            where,
            got="examples of different forms",
            wanted="texts only, or pairs of a prompt and its completion only",
            next_step="Write a text without a prompt as the pair of an empty prompt and the text.",
        )
    if not pairs:
        return TaskExamples(None, texts, end=False, where=where)
    prompts, completions = zip(*pairs, strict=True)
    refuse_empty(completions, where)
    return TaskExamples(prompts, completions, end=False, where=where)


def joined_knowledge(parts: Sequence[Calibration]) -> Calibration:
    """Returns the tokens of all sets in order; which text is of which set is kept.

    Of a set without prompts all tokens are learned, as if its prompts were empty.
    """
    if len(parts) == 1:
        return parts[0]
    whole = Calibration(
        tuple(ids for part in parts for ids in part.sequences),
        parts[0].pad_id,
        sets=tuple(len(part.sequences) for part in parts),
    )
    if all(part.learned is None for part in parts):
        return whole
    masks = (part.learned or tuple(after(0, len(ids)) for ids in part.sequences) for part in parts)
    return replace(whole, learned=tuple(mask for part in masks for mask in part))


def refuse_empty(texts: Sequence[str], where: str, what: str = "completion") -> None:
    """Raises DataError where a text is empty."""
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            raise DataError(
                f"{where} example {number}",
                got=f"an empty {what}",
                wanted=f"a {what} that is not empty",
                next_step="Remove the row or change the template.",
            )
