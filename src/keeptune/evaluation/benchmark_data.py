"""The data that a benchmark is scored on: its fingerprint, what runs it, and the refusal of data used before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from keeptune.core.artefact import content_key, file_fingerprint
from keeptune.core.errors import DataError
from keeptune.data.disjoint import Corpus, refuse_overlap
from keeptune.data.sources import read_jsonl
from keeptune.evaluation.benchmarks import Benchmark, FileBenchmark
from keeptune.evaluation.chat import asking
from keeptune.evaluation.items import load_items
from keeptune.evaluation.standard.documents import load_documents, refuse_documents
from keeptune.evaluation.standard.entry import NamedBenchmark
from keeptune.evaluation.standard.lm_eval_tasks import SEED
from keeptune.evaluation.standard.restore import engine_version


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
