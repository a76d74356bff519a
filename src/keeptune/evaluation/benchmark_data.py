"""The data that a benchmark is scored on: items as lm-eval loads them, fingerprints, refusal of data used before."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from keeptune.core.artefact import canonical_json, content_key, file_fingerprint
from keeptune.core.errors import DataError
from keeptune.data.sources import Row, read_jsonl
from keeptune.evaluation.benchmarks import Benchmark, FileBenchmark, asking, template_of
from keeptune.evaluation.items import load_items
from keeptune.evaluation.standard.entry import NamedBenchmark
from keeptune.evaluation.standard.language_model import engine_version, restored_process
from keeptune.evaluation.standard.lm_eval_tasks import SEED, build_tasks


def data_fingerprint(benchmark: Benchmark, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    """Returns a fingerprint of a benchmark's data, and of the chat template that they are asked through."""
    if isinstance(benchmark, NamedBenchmark):
        return load_documents(benchmark, tokenizer).fingerprint
    assert isinstance(benchmark, FileBenchmark)
    data = file_fingerprint([Path(benchmark.file)])
    if tokenizer is None or not benchmark.templated:
        return data
    return content_key([data, asking(benchmark, tokenizer).template(None)])


def engine_of(benchmark: Benchmark) -> dict[str, str | int] | None:
    """Returns lm-eval's version and the seed of its examples for a benchmark's record; None for a user's own file."""
    if not isinstance(benchmark, NamedBenchmark):
        return None
    return {"lm_eval": engine_version(benchmark.where), "seed": SEED}


def refuse_used(used: Sequence[Corpus], benchmark: Benchmark, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
    """Checks that nothing is scored that was used to prepare or to train, and that the tokenizer can ask it.

    Raises:
        DataError: They overlap, or the data of the benchmark cannot be read.
        RecipeError: The settings of the benchmark do not fit the chat template.
    """
    check = _overlap_check(benchmark, tokenizer)
    for corpus in used:
        check(corpus)


def used_rows(corpus: Corpus, benchmark: Benchmark, tokenizer: PreTrainedTokenizerBase | None = None) -> set[int]:
    """Returns the rows of a corpus that hold an item of a benchmark.

    Raises:
        DataError: The data of the benchmark cannot be read.
    """
    check = _overlap_check(benchmark, tokenizer)

    def overlaps(part: Corpus) -> bool:
        try:
            check(part)
        except DataError:
            return True
        return False

    if not overlaps(corpus):
        return set()
    alone = (Corpus(corpus.where, [row], [text]) for row, text in zip(corpus.rows, corpus.texts, strict=True))
    return {number for number, part in enumerate(alone) if overlaps(part)}


def _overlap_check(benchmark: Benchmark, tokenizer: PreTrainedTokenizerBase | None) -> Callable[[Corpus], None]:
    if isinstance(benchmark, NamedBenchmark):
        documents = load_documents(benchmark, tokenizer)
        return lambda corpus: refuse_documents([corpus], documents)
    assert isinstance(benchmark, FileBenchmark)
    if benchmark.templated and tokenizer is not None:
        asking(benchmark, tokenizer)
    rows = read_jsonl(benchmark.file, where=f"{benchmark.where}.file")[: benchmark.examples]
    scored = Corpus(benchmark.where, rows, [item.whole for item in load_items(benchmark, Path())])
    return lambda corpus: refuse_overlap(corpus, scored)


_WORDS = 5  # an item is looked for by its first words
_SHOWN = 5  # rows named in an error
_Parts = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Documents:
    """The items that a benchmark is scored on, task after task."""

    where: str
    parts: Sequence[_Parts]  # texts that identify each item: a question, or a question and its choices
    fingerprint: str  # of the items, the examples for the prompts, lm-eval and its task, and the chat template


def load_documents(benchmark: NamedBenchmark, tokenizer: PreTrainedTokenizerBase | None = None) -> Documents:
    """Loads the items, from the hub or from local files; with a tokenizer its chat template counts where it is used.

    Raises:
        RecipeError: lm-eval is missing or has no such task; or the task cannot be asked through the template.
        DataError: The data cannot be fetched or read; or an example for the prompts is one of the items.
    """
    rows, pools, parts = [], [], []
    with restored_process(benchmark.where):
        built = build_tasks(benchmark, run=False)
        for task in built.tasks.values():
            own = list(task.eval_docs)[: benchmark.examples]
            rows += [dict(row) for row in own]
            parts += [_parts(benchmark, task, row) for row in own]
            pools.append([dict(row) for row in task.sampler.df] if task.config.num_fewshot else [])
        chat = None if tokenizer is None else template_of(benchmark, tokenizer, built.tasks)
        scored = set(parts)
        for (leaf, task), pool in zip(built.tasks.items(), pools, strict=True):
            examples = [_parts(benchmark, task, row) for row in pool]
            common = [example for example in examples if example in scored]
            if common:
                first = common[0][0][:60]
                raise DataError(
                    f"{benchmark.where}.shots",
                    got=f"{len(common)} of the {len(pool)} examples of {leaf} that are scored too ({first!r})",
                    wanted="examples from other data",
                    next_step="Set `shots: 0`, or take the items out of the training split.",
                )
    versions = [[leaf, str(task.VERSION)] for leaf, task in built.tasks.items()]
    plain = json.loads(json.dumps([rows, pools], default=str))  # rows may hold dates
    key = [*plain, versions, engine_version(benchmark.where), built.note]
    if chat is not None:
        key.append(chat.template(None))
    return Documents(benchmark.where, parts, content_key(key))


def _parts(benchmark: NamedBenchmark, task: Any, row: Row) -> _Parts:
    table = benchmark.row
    if table is None or not all(field in row for field in table.content):
        text = task.doc_to_text(row)
        return (str(text if isinstance(text, str) else task.doc_to_target(row)),)
    return tuple(plain for field in table.content for text in _texts(row[field]) if (plain := _plain(text)))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts(value["text"] if "text" in value and "label" in value else list(value.values()))
    elif isinstance(value, Sequence):
        for part in value:
            yield from _texts(part)


def refuse_documents(used: Sequence[Corpus], scored: Documents) -> None:
    """Checks that no item was among the data that were used to prepare or to train.

    An item was used when one used row, its prompt with it, holds every part of the item (case, punctuation at ends and
    white space aside): a question, or a question and all its choices. An item of fewer than five words has to be a
    field of the row by itself, or to stand at its start or end: in longer texts it would occur by chance.

    Raises:
        DataError: Some were; their numbers and the first of them are shown.
    """
    for corpus in used:
        questions = [parts[0] if parts else "" for parts in scored.parts]
        _refuse(_common(corpus, scored.parts), questions, scored.where, corpus.where)


def _refuse(common: Sequence[int], texts: Sequence[str], scored: str, used: str) -> None:
    """Raises DataError where there are items, by their numbers from 0, that are in data that were used too."""
    if common:
        numbers = ", ".join(str(number + 1) for number in common[:_SHOWN]) + "..." * (len(common) > _SHOWN)
        first = texts[common[0]].strip("\0")[:60]
        raise DataError(
            scored,
            got=f"{len(common)} of {len(texts)} items that are in {used} too (items {numbers}; {first!r})",
            wanted="disjoint data",
            next_step="Take these rows out of the data: what is measured may be neither calibrated nor trained on.",
        )


def _common(corpus: Corpus, items: Sequence[_Parts]) -> list[int]:
    starts: dict[_Parts, list[int]] = {}
    for number, parts in enumerate(items):
        if parts and parts[0]:
            starts.setdefault(tuple(parts[0].split()[:_WORDS]), []).append(number)
    lengths = sorted({len(words) for words in starts})
    common: set[int] = set()
    for row, text in zip(corpus.rows, corpus.texts, strict=True):
        fields = [_plain(field) for field in (text.strip("\0"), *_texts(list(row.values())))]
        for words in {tuple(field.split()) for field in fields}:
            windows = (words[at : at + length] for length in lengths for at in range(len(words) - length + 1))
            candidates = {number for window in windows for number in starts.get(window, ())}
            common |= {number for number in candidates - common if _holds(fields, items[number])}
    return sorted(common)


def _holds(fields: Sequence[str], parts: Sequence[str]) -> bool:
    question = parts[0]
    if sum(part.count(" ") + 1 for part in parts) < _WORDS:
        ends = (f"{question} ", f" {question}")
        if not any(field == question or field.startswith(ends[0]) or field.endswith(ends[1]) for field in fields):
            return False
    return all(any(f" {part} " in f" {field} " for field in fields) for part in parts)


def _plain(text: str) -> str:
    words = (re.sub(r"^\W+|\W+$", "", word) for word in text.lower().split())
    return " ".join(word for word in words if word)


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
    lengths = {len(_folded(text)) for text in scored.texts}
    starts = {text[:length] for text in map(_folded, used.texts) for length in lengths if length <= len(text)}
    pairs = enumerate(zip(scored.rows, scored.texts, strict=True))
    common = [at for at, (row, text) in pairs if canonical_json(row) in rows or _folded(text) in starts]
    _refuse(common, scored.texts, scored.where, used.where)


def _folded(text: str) -> str:
    return " ".join(text.lower().split())
