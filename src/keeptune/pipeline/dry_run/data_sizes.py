"""What is known of the data that a recipe names: rows and tokens of what is at hand, sizes of what is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from keeptune.data import hub
from keeptune.data.completions import TaskExamples
from keeptune.data.sources import read_jsonl
from keeptune.evaluation.benchmarks import FileBenchmark
from keeptune.evaluation.items import Item, load_items
from keeptune.evaluation.standard import NamedBenchmark
from keeptune.model.pretrained import load_tokenizer
from keeptune.pipeline.dry_run.account import Named, Scored
from keeptune.pipeline.dry_run.known import BENCHMARKS, FILES
from keeptune.pipeline.job import Job
from keeptune.recipe.schema import Recipe

__all__ = ["Lengths", "fetched_benchmarks", "files_of", "needs_of", "rows_of"]

_SAMPLE = 256  # rows whose tokens are counted, to estimate those of all
_POSITIONS = 2048  # tokens of an item of a benchmark at most, where neither recipe nor model says


def rows_of(name: str, limit: int | None) -> int | None:
    """Count the rows of a data file that are used.

    Args:
        name: The file, or its name on the hub.
        limit: How many at most; None is all.

    Returns:
        Rows; None where they are not known.
    """
    if name.startswith(hub.PREFIX):
        known = FILES.get(name)
        rows = None if known is None else known.rows
        return limit if rows is None else min(rows, limit or rows)
    return len(read_jsonl(name, where=name)[:limit])


def files_of(recipe: Recipe) -> list[Named]:
    """List the data files that a recipe names.

    Args:
        recipe: The recipe.

    Returns:
        Each once.
    """
    named = [("task", recipe.task.train), *(("knowledge", part.file) for part in recipe.knowledge_sets)]
    named += [("benchmark", path) for one in recipe.evaluate if (path := _path_of(one)) is not None]
    return [_file(what, name) for what, name in dict.fromkeys(named)]


def _file(what: str, name: str) -> Named:
    path, known = Path(name), FILES.get(name)
    if name.startswith(hub.PREFIX):
        revision = name.partition("@")[2].partition("/")[0] or None
        return Named(what, name, revision, None if known is None else known.bytes, at_hand=False)
    return Named(what, name, None, path.stat().st_size if path.exists() else None, at_hand=path.exists())


def _path_of(benchmark: FileBenchmark | NamedBenchmark) -> str | None:
    return benchmark.file if isinstance(benchmark, FileBenchmark) else benchmark.data


def needs_of(recipe: Recipe) -> list[Named]:
    """List data files and the benchmarks that lm-eval would fetch.

    Args:
        recipe: The recipe.

    Returns:
        Each once.
    """
    fetched = [
        Named("benchmark", f"{one.name} (lm-eval: {one.lm_eval_task})", None, None, at_hand=False)
        for one in fetched_benchmarks(recipe)
    ]
    return [*files_of(recipe), *fetched]


def fetched_benchmarks(recipe: Recipe) -> list[NamedBenchmark]:
    """List the benchmarks whose items lm-eval fetches.

    Args:
        recipe: The recipe.

    Returns:
        Those that name no data of their own.
    """
    return [one for one in recipe.evaluate if isinstance(one, NamedBenchmark) and one.data is None]


@dataclass(frozen=True)
class Lengths:
    """Tokens of a recipe's data: means over what is at hand, bounds elsewhere.

    Args:
        job: The job.
        positions: How many tokens the model takes; None is without limit.
    """

    job: Job
    positions: int | None

    @property
    def most(self) -> int:
        """Tokens of a training example at most."""
        given = self.job.recipe.train.get("max_length")
        return int(given or min(1024, self.positions or 1024))

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase | None:
        folder = Path(self.job.recipe.model).expanduser()
        if not folder.is_dir():
            return None
        return load_tokenizer(str(folder), trust_remote_code=self.job.recipe.trust_remote_code)

    def _counts(self, texts: Sequence[str], most: int) -> list[int]:
        if self._tokenizer is None or not texts:
            return []
        # 1: the end of text that is learned after each.
        return [min(len(ids) + 1, most) for ids in self._tokenizer(list(texts))["input_ids"]]

    @cached_property
    def task(self) -> list[int]:
        """Tokens of the first training examples; empty where they or the tokenizer are not at hand."""
        if self.job.recipe.task.train.startswith(hub.PREFIX):
            return []
        examples = self.job.task
        if isinstance(examples, TaskExamples):
            pairs = zip(examples.prompts[:_SAMPLE], examples.completions[:_SAMPLE], strict=True)
            return self._counts([prompt + completion for prompt, completion in pairs], self.most)
        return self._counts(examples.texts.whole[:_SAMPLE], self.most)

    def calibration(self, role: str) -> tuple[int, float]:
        """Count the texts that statistics are taken over.

        Args:
            role: ``knowledge`` or ``task``.

        Returns:
            How many, and their tokens at most.
        """
        recipe = self.job.recipe
        if role == "task":
            wanted = recipe.task.calibration
            rows = rows_of(recipe.task.train, recipe.task.examples)
            return min(wanted.examples, rows or wanted.examples), self._capped(wanted.max_length)
        texts = sum(part.examples for part in recipe.knowledge_sets)
        return texts, self._capped(max((part.max_length for part in recipe.knowledge_sets), default=0))

    def _capped(self, length: int) -> int:
        return min(length, self.positions or length)

    def longest(self, benchmark: FileBenchmark | NamedBenchmark) -> int:
        """Say how many tokens an item of a benchmark has at most.

        Args:
            benchmark: An entry of ``evaluate``.

        Returns:
            Tokens.
        """
        return self._capped(benchmark.max_length or _POSITIONS)

    def scored(self, benchmark: FileBenchmark | NamedBenchmark) -> Scored:
        """Say what is known of a benchmark.

        Args:
            benchmark: An entry of ``evaluate``.

        Returns:
            Its items and their tokens.
        """
        mean = None
        if isinstance(benchmark, FileBenchmark):
            items = rows_of(benchmark.file, benchmark.examples)
            mean = None if benchmark.file.startswith(hub.PREFIX) else self._mean(benchmark)
        else:
            known = BENCHMARKS.get(benchmark.task or benchmark.name)
            items = benchmark.examples
            if benchmark.data is None and known is not None:
                items = min(known, benchmark.examples or known)
        return Scored(
            name=benchmark.name,
            role=str(benchmark.role),
            items=items,
            metric=str(benchmark.metric),
            length=float(self.longest(benchmark)) if mean is None else mean,
            measured=mean is not None,
        )

    def _mean(self, benchmark: FileBenchmark) -> float | None:
        items = load_items(benchmark, Path())[:_SAMPLE]
        counts = self._counts([text for item in items for text in _texts_of(item)], self.longest(benchmark))
        if not counts:
            return None
        # A choice is a sequence of its own; a generated answer is counted at its longest.
        return sum(counts) / len(items) + (benchmark.max_new_tokens if benchmark.metric == "exact_match" else 0)


def _texts_of(item: Item) -> list[str]:
    if item.choices:
        return [item.prompt + choice for choice in item.choices]
    return [item.prompt or item.text + (item.text_pair or "")]
