"""Scores of several models tuned from one base on the same items: each against the base, and against the first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keeptune.evaluation.benchmarks import Benchmark
from keeptune.evaluation.harness import evaluate
from keeptune.evaluation.model_pairs import TwoModels
from keeptune.evaluation.results import interval_between

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
    """Scores benchmarks with a base and each model tuned from it.

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
    results = {}
    for label, load in models.items():
        pair = TwoModels(base, load())
        results[label] = [evaluate(pair, tokenizer, benchmark, Path(), seed=seed) for benchmark in benchmarks]
    rows = []
    for scored in zip(*results.values(), strict=True):
        first = scored[0]
        of_items = first.metric not in _OF_THE_WHOLE
        entries = [
            {
                "label": label,
                "score": result.after,
                "interval": list(result.interval),
                "kl_to_base": result.kl_to_base,
                "interval_to_first": list(interval_between(first, result, seed))
                if of_items and result is not first
                else None,
            }
            for label, result in zip(results, scored, strict=True)
        ]
        row = {"name": first.name, "role": first.role, "metric": first.metric, "n": first.n}
        rows.append(row | {"base": first.before, "models": entries})
    return rows
