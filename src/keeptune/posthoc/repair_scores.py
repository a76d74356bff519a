"""Score several models tuned from one base on the same items: each against the base, and against the first of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keeptune.evaluation.benchmarks import Benchmark
from keeptune.evaluation.harness import evaluate
from keeptune.evaluation.metrics import paired_interval
from keeptune.evaluation.model_pairs import TwoModels
from keeptune.evaluation.results import BenchmarkResult

__all__ = ["score_models"]

# Metrics that are no means over items, or whose items have several answers.
_OF_THE_WHOLE = ("f1", "matthews", "pearson", "spearman", "instructions_followed")


def score_models(
    base: PreTrainedModel,
    models: Mapping[str, Callable[[], PreTrainedModel]],
    tokenizer: PreTrainedTokenizerBase,
    benchmarks: Sequence[Benchmark],
    *,
    seed: int,
) -> list[dict[str, Any]]:
    """Score benchmarks with a base and each model tuned from it.

    Args:
        base: The base.
        models: Label to what loads the model; one is held at a time.
        tokenizer: Their tokenizer.
        benchmarks: What to score.
        seed: Seed of the bootstrap intervals.

    Returns:
        One row for each benchmark: ``name``, ``role``, ``metric``, ``n``, ``base`` (the base's score) and ``models``:
        of each its ``label``, ``score``, the 95% ``interval`` of its difference to the base, ``kl_to_base`` (of
        cross-entropies), and ``interval_to_first``, that of its difference to the first model (None for the first,
        and for metrics that are no means over items).
    """
    results: dict[str, dict[str, BenchmarkResult]] = {}
    for label, load in models.items():
        pair = TwoModels(base, load())
        results[label] = {b.name: evaluate(pair, tokenizer, b, Path(), seed=seed) for b in benchmarks}
    rows = []
    for benchmark in benchmarks:
        found = {label: by_name[benchmark.name] for label, by_name in results.items()}
        first = next(iter(found.values()))
        entries = [
            {
                "label": label,
                "score": result.after,
                "interval": list(result.interval),
                "kl_to_base": result.kl_to_base,
                "interval_to_first": None if result is first else _between(first, result, seed),
            }
            for label, result in found.items()
        ]
        row = {"name": benchmark.name, "role": benchmark.role, "metric": first.metric, "n": first.n}
        rows.append(row | {"base": first.before, "models": entries})
    return rows


def _between(first: BenchmarkResult, second: BenchmarkResult, seed: int) -> list[float] | None:
    """Give the paired interval of the difference between two tuned models."""
    if first.metric in _OF_THE_WHOLE:
        return None
    weights = [float(item.get("tokens", 1)) for item in first.items]
    before, after = (
        [item["after"] * weight for item, weight in zip(result.items, weights, strict=True)]
        for result in (first, second)
    )
    return list(paired_interval(before, after, seed, weights=weights))
