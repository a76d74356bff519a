"""The items of a standard benchmark as lm-eval loads them, and the check that none of them was used before."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from keeptune.core.artefact import content_key
from keeptune.core.errors import DataError
from keeptune.data.disjoint import Corpus
from keeptune.data.sources import Row
from keeptune.evaluation.standard.entry import NamedBenchmark
from keeptune.evaluation.standard.lm_eval_tasks import Built, build_tasks
from keeptune.evaluation.standard.restore import as_found, engine_version

__all__ = ["Documents", "load_documents", "refuse_documents"]

_WORDS = 5  # an item is looked for by its first words
_SHOWN = 5  # rows named in an error


@dataclass(frozen=True, slots=True)
class Documents:
    """What a benchmark is scored on.

    Args:
        where: The recipe key.
        rows: The items that are scored, task after task.
        parts: Of each item the texts that say which it is: a question, or a question and its choices.
        fingerprint: Of the items, the examples for the prompts, lm-eval and its task.
        note: What was departed from.
    """

    where: str
    rows: Sequence[Row]
    parts: Sequence[tuple[str, ...]]
    fingerprint: str
    note: str


def load_documents(benchmark: NamedBenchmark) -> Documents:
    """Load the items, from the hub or from local files.

    Args:
        benchmark: The benchmark.

    Returns:
        The items.

    Raises:
        RecipeError: lm-eval is missing or has no such task.
        DataError: The data cannot be fetched or read; or an example for the prompts is one of the items.
    """
    with as_found(benchmark.where):
        built = build_tasks(benchmark, run=False)
        rows = [dict(row) for task in built.tasks.values() for row in _scored(benchmark, task)]
        parts = [_parts(benchmark, task, row) for task in built.tasks.values() for row in _scored(benchmark, task)]
        _refuse_examples(benchmark, built, parts)
        pools = [list(task.sampler.df) if task.config.num_fewshot else [] for task in built.tasks.values()]
    versions = [[leaf, str(task.VERSION)] for leaf, task in built.tasks.items()]
    key = content_key([_plain_rows(rows), _plain_rows(pools), versions, engine_version(benchmark.where), built.note])
    return Documents(benchmark.where, rows, parts, key, built.note)


def _scored(benchmark: NamedBenchmark, task: Any) -> list[Row]:
    return list(task.eval_docs)[: benchmark.examples]


def _plain_rows(value: Any) -> Any:
    """Turn rows into values that a content key takes."""
    if isinstance(value, Mapping):
        return {str(key): _plain_rows(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_rows(part) for part in value]
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)


def _parts(benchmark: NamedBenchmark, task: Any, row: Row) -> tuple[str, ...]:
    known = benchmark.known
    if known is None or not all(field in row for field in known.content):
        text = task.doc_to_text(row)
        return (str(text if isinstance(text, str) else task.doc_to_target(row)),)
    return tuple(plain for field in known.content for text in _texts(row[field]) if (plain := _plain(text)))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts(value["text"] if "text" in value and "label" in value else list(value.values()))
    elif isinstance(value, Sequence):
        for part in value:
            yield from _texts(part)


def _refuse_examples(benchmark: NamedBenchmark, built: Built, parts: Sequence[tuple[str, ...]]) -> None:
    """Refuse examples for the prompts that are scored themselves: the prompt would hold the answer."""
    scored = set(parts)
    for leaf, task in built.tasks.items():
        if not task.config.num_fewshot:
            continue
        common = [row for row in task.sampler.df if _parts(benchmark, task, row) in scored]
        if common:
            raise DataError(
                f"{benchmark.where}.shots",
                got=f"{len(common)} of the {len(task.sampler.df)} examples of {leaf} that are scored too "
                f"({_parts(benchmark, task, common[0])[0][:60]!r})",
                wanted="examples from other data",
                next_step="Set `shots: 0`, or take the items out of the training split.",
            )


def refuse_documents(used: Sequence[Corpus], scored: Documents) -> None:
    """Check that no item was among the data that were used to prepare or to train.

    An item was used when one used row, its prompt with it, holds every part of the item (case, punctuation at ends and
    white space aside): a question, or a question and all its choices. An item of fewer than five words has to be a
    field of the row by itself, or to stand at its start or end: it would be found by chance in longer texts.

    Args:
        used: Knowledge and task data.
        scored: The items.

    Raises:
        DataError: Some were; their numbers and the first of them are shown.
    """
    for corpus in used:
        found = _common(corpus, scored.parts)
        if found:
            numbers = ", ".join(str(number + 1) for number in found[:_SHOWN])
            more = "..." if len(found) > _SHOWN else ""
            raise DataError(
                scored.where,
                got=f"{len(found)} of {len(scored.parts)} items that are in {corpus.where} too "
                f"(items {numbers}{more}; {scored.parts[found[0]][0][:60]!r})",
                wanted="disjoint data",
                next_step="Take these rows out of the data: what is measured may be neither calibrated nor trained on.",
            )


def _common(corpus: Corpus, items: Sequence[tuple[str, ...]]) -> list[int]:
    """Find the items that one used row holds."""
    starts: dict[tuple[str, ...], list[int]] = {}
    for number, parts in enumerate(items):
        if parts and parts[0]:
            starts.setdefault(tuple(parts[0].split()[:_WORDS]), []).append(number)
    lengths = sorted({len(words) for words in starts})
    found: set[int] = set()
    for row, text in zip(corpus.rows, corpus.texts, strict=True):
        fields = [_plain(field) for field in (text.strip("\0"), *_texts(list(row.values())))]
        candidates = {number for field in set(fields) for number in _candidates(field.split(), starts, lengths)}
        found |= {number for number in candidates - found if _holds(fields, items[number])}
    return sorted(found)


def _candidates(words: Sequence[str], starts: Mapping[tuple[str, ...], list[int]], lengths: Sequence[int]) -> list[int]:
    windows = (tuple(words[at : at + length]) for length in lengths for at in range(len(words) - length + 1))
    return [number for window in windows if window in starts for number in starts[window]]


def _holds(fields: Sequence[str], parts: Sequence[str]) -> bool:
    question = parts[0]
    if sum(part.count(" ") + 1 for part in parts) < _WORDS:
        ends = (f"{question} ", f" {question}")
        if not any(field == question or field.startswith(ends[0]) or field.endswith(ends[1]) for field in fields):
            return False
    return all(any(f" {part} " in f" {field} " for field in fields) for part in parts)


def _plain(text: str) -> str:
    """Write a text in lower case with single spaces, words without punctuation at their ends."""
    words = (re.sub(r"^\W+|\W+$", "", word) for word in text.lower().split())
    return " ".join(word for word in words if word)
