"""A standard benchmark scored with the base and with the tuned model: lm-eval asks and scores, we compare by items."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keeptune.core.errors import RecipeError
from keeptune.evaluation.base_answers import KeptAnswers
from keeptune.evaluation.benchmarks import Measure, Role
from keeptune.evaluation.label_metrics import agreement, agreement_interval
from keeptune.evaluation.metrics import paired_interval
from keeptune.evaluation.model_pairs import ModelPair, Side, scoring
from keeptune.evaluation.results import BenchmarkResult, grouped, rate
from keeptune.evaluation.standard.entry import NamedBenchmark
from keeptune.evaluation.standard.language_model import fit_length, make_asked
from keeptune.evaluation.standard.lm_eval_tasks import SEED, Built, build_tasks, noted_shots
from keeptune.evaluation.standard.restore import as_found, model_as_found, steady_languages
from keeptune.evaluation.standard.samples import Sample, read_samples, records_of
from keeptune.model.head import Head

__all__ = ["score_named"]

_SIDES: tuple[Side, Side] = ("before", "after")
Records = list[dict[str, Any]]


def score_named(
    pair: ModelPair,
    tokenizer: PreTrainedTokenizerBase,
    benchmark: NamedBenchmark,
    *,
    seed: int = 0,
    progress: bool = True,
    kept: KeptAnswers | None = None,
) -> BenchmarkResult:
    """Score a standard benchmark before and after fine-tuning.

    Laws: models, tokenizer, random number generators, environment and loggers are left as they were found; both
    models read the same prompts; the scores are lm-eval's own of the same answers.

    Args:
        pair: The models.
        tokenizer: Their tokenizer; its settings stay as they are.
        benchmark: What to score.
        seed: Seed of the bootstrap interval; examples in the prompts do not depend on it.
        progress: Whether to show bars, where stderr is a terminal.
        kept: Where the base's answers are, so that it is not asked again; None asks it.

    Returns:
        The scores, their interval and the record of every item.

    Raises:
        RecipeError: lm-eval is missing, has no such task, or measures it in a way that is not known here.
        DataError: The data cannot be fetched or read, or hold no examples for the prompts.
    """
    with as_found(benchmark.where):
        built = build_tasks(benchmark)
        with _all(pair) as models:
            length = fit_length(benchmark, models, built.tasks)
        found: dict[Side, list[Sample]] = {}
        for side in _SIDES:
            with scoring(pair, side) as model, model_as_found(model):
                asked = make_asked(model, tokenizer, benchmark, length=length, side=side, progress=progress, kept=kept)
                found[side] = _samples(asked, benchmark, built)
    return _result(benchmark, built, tokenizer, found, seed)


@contextlib.contextmanager
def _all(pair: ModelPair) -> Iterator[list[PreTrainedModel]]:
    """Look at both models, one after the other; only their configs are read."""
    models = []
    for side in _SIDES:
        with scoring(pair, side) as model:
            if Head.of(model) is not None:
                raise RecipeError(
                    "evaluate",
                    got="a standard benchmark for a classifier",
                    wanted="a language model",
                    next_step="Score a classifier on a file: `file`, `text`, `answer` and `metric`.",
                )
            models.append(model)
    yield models


def _samples(asked: Any, benchmark: NamedBenchmark, built: Built) -> list[Sample]:
    """Let lm-eval ask and score one model."""
    from lm_eval.evaluator import evaluate

    # For tasks that sample their answers, and for checks that draw (IFEval's).
    torch.manual_seed(SEED)
    random.seed(SEED)
    np.random.seed(SEED)
    if built.runs is not None:
        built.runs.outcomes.clear()
    for task in built.tasks.values():
        task.set_fewshot_seed(SEED)
    with noted_shots(built) as shots, steady_languages():
        results = evaluate(
            lm=asked,
            task_dict={"tasks": dict(built.tasks), "groups": {}, "group_map": {}},
            limit=benchmark.examples,
            bootstrap_iters=0,  # the intervals are ours, of pairs
            log_samples=True,
        )
    outcomes = [] if built.runs is None else [outcome.said for outcome in built.runs.outcomes]
    return read_samples(benchmark, built, results["samples"], outcomes, shots)


def _result(
    benchmark: NamedBenchmark,
    built: Built,
    tokenizer: PreTrainedTokenizerBase,
    found: Mapping[Side, Sequence[Sample]],
    seed: int,
) -> BenchmarkResult:
    first, second = found["before"], found["after"]
    assert [sample.prompt for sample in first] == [sample.prompt for sample in second]
    metric = first[0].metric
    records = records_of(benchmark, tokenizer, first, second)
    weights = [float(record.get("tokens", record.get("instructions", 1))) for record in records]
    before, after = (
        [record[side] * weight for record, weight in zip(records, weights, strict=True)] for side in _SIDES
    )
    if metric in ("f1", "matthews"):
        score = _of_the_whole(metric, first, second, seed)
    else:
        score = (rate(before, weights), rate(after, weights), paired_interval(before, after, seed, weights=weights))
    groups = [record["group"] for record in records]
    return BenchmarkResult(
        name=benchmark.name,
        role=cast(Role, benchmark.role),
        metric=metric,
        n=len(records),
        before=score[0],
        after=score[1],
        interval=score[2],
        kl_to_base=None,
        groups={} if metric in ("f1", "matthews") else grouped(groups, before, after, weights),
        items=records,
    )


def _of_the_whole(
    metric: Measure, first: Sequence[Sample], second: Sequence[Sample], seed: int
) -> tuple[float, float, tuple[float, float]]:
    """Score all labels together: the right one and what each model says."""
    truth, before = np.array([sample.value for sample in first]).T
    after = np.array([sample.value for sample in second])[:, 1]
    labels = max(2, int(max(truth.max(), before.max(), after.max())) + 1)
    kind = cast(Any, metric)
    return (
        agreement(kind, truth, before, labels),
        agreement(kind, truth, after, labels),
        agreement_interval(kind, truth, before, after, seed, labels),
    )
