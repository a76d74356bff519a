"""The items of a standard benchmark, as lm-eval loads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from keeptune.core.errors import RecipeError
from keeptune.data.overlap import Corpus
from keeptune.data.sources import Row
from keeptune.evaluate.standard.entry import NamedBenchmark

__all__ = ["Documents", "load_documents", "refuse_documents"]


@dataclass(frozen=True, slots=True)
class Documents:
    """What a benchmark is scored on.

    Args:
        where: The recipe key.
        rows: The items.
        fingerprint: Of the items and of lm-eval's task.
    """

    where: str
    rows: Sequence[Row]
    fingerprint: str


def load_documents(benchmark: NamedBenchmark) -> Documents:
    """Load the items.

    Args:
        benchmark: The benchmark.

    Raises:
        RecipeError: Not here yet.
    """
    raise RecipeError(benchmark.where, got="a name", wanted="a file", next_step="Standard benchmarks come soon.")


def refuse_documents(used: Sequence[Corpus], scored: Documents) -> None:
    """Check that no item was used.

    Args:
        used: Knowledge and task data.
        scored: The items.
    """
