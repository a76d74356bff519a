"""What the two kinds of benchmark have in common: a file of the user's own, and a standard benchmark by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from keeptune.core.artefact import file_fingerprint
from keeptune.data.disjoint import Corpus, refuse_overlap
from keeptune.data.labelled import Texts
from keeptune.data.sources import read_jsonl
from keeptune.evaluation.benchmarks import Benchmark, Item, load_items
from keeptune.evaluation.standard import NamedBenchmark
from keeptune.evaluation.standard.documents import load_documents, refuse_documents
from keeptune.evaluation.standard.lm_eval_tasks import SEED
from keeptune.evaluation.standard.restore import engine_version

__all__ = ["AnyBenchmark", "data_fingerprint", "engine_of", "item_texts", "refuse_used"]

AnyBenchmark = Benchmark | NamedBenchmark


def data_fingerprint(benchmark: AnyBenchmark, folder: Path = Path()) -> str:
    """Name the data that a benchmark is scored on.

    Args:
        benchmark: The benchmark.
        folder: The folder that a relative path starts from.

    Returns:
        The fingerprint; equal for equal data.
    """
    if isinstance(benchmark, NamedBenchmark):
        return load_documents(benchmark).fingerprint
    return file_fingerprint([folder / benchmark.file])


def engine_of(benchmark: AnyBenchmark) -> dict[str, str | int] | None:
    """Say what runs a benchmark, for its record.

    Args:
        benchmark: The benchmark.

    Returns:
        lm-eval's version and the seed that examples for prompts are drawn with; None for a file of the user's own.
    """
    if not isinstance(benchmark, NamedBenchmark):
        return None
    return {"lm_eval": engine_version(benchmark.where), "seed": SEED}


def refuse_used(used: Sequence[Corpus], benchmark: AnyBenchmark) -> None:
    """Check that nothing is scored that was used to prepare or to train.

    Args:
        used: Knowledge and task data.
        benchmark: What is scored.

    Raises:
        DataError: They overlap, or the data of the benchmark cannot be read.
    """
    if isinstance(benchmark, NamedBenchmark):
        refuse_documents(used, load_documents(benchmark))
        return
    rows = read_jsonl(benchmark.file, where=f"{benchmark.where}.file")[: benchmark.examples]
    scored = Corpus(benchmark.where, rows, item_texts(load_items(benchmark, Path())))
    for corpus in used:
        refuse_overlap(corpus, scored)


def item_texts(items: Sequence[Item]) -> list[str]:
    """List what the model reads of each item of a benchmark.

    Args:
        items: The items.

    Returns:
        One text per item.
    """
    return [
        Texts((item.text,), None if item.text_pair is None else (item.text_pair,)).whole[0]
        if item.score is not None or (item.text and item.answers)
        else item.prompt or item.text
        for item in items
    ]
