"""A standard benchmark scored with the base and with the tuned model by lm-eval, and compared item by item."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keeptune.core.errors import RecipeError
from keeptune.evaluation.base_answers import KeptAnswers
from keeptune.evaluation.benchmarks import Role
from keeptune.evaluation.metrics import Metric, agreement, agreement_interval
from keeptune.evaluation.model_pairs import SIDES, ModelPair, Side, scoring
from keeptune.evaluation.results import BenchmarkResult, mean_scores
from keeptune.evaluation.standard.entry import NamedBenchmark
from keeptune.evaluation.standard.language_model import Answering, fit_length, wrapped_model
from keeptune.evaluation.standard.lm_eval_tasks import SEED, Built, build_tasks, recorded_shots
from keeptune.evaluation.standard.restore import restored_model, restored_process, seeded_langdetect
from keeptune.evaluation.standard.samples import Sample, read_samples, records_of
from keeptune.model.head import Head

__all__ = ["score_named"]


def score_named(
    pair: ModelPair,
    tokenizer: PreTrainedTokenizerBase,
    benchmark: NamedBenchmark,
    *,
    seed: int = 0,
    progress: bool = True,
    kept: KeptAnswers | None = None,
) -> BenchmarkResult:
    """Scores a standard benchmark before and after fine-tuning.

    Laws: models, tokenizer, random number generators, environment and loggers are left as they were; both models read
    the same prompts; the scores are lm-eval's own of the same answers.

    Args:
        pair: The models.
        tokenizer: Their tokenizer; its settings stay as they are.
        benchmark: What to score.
        seed: Seed of the bootstrap interval; examples in the prompts do not depend on it.
        progress: Whether to show bars, where stderr is a terminal.
        kept: The base's answers on disk; None runs the base.

    Returns:
        The scores, their interval and the record of every item.

    Raises:
        RecipeError: lm-eval is missing, has no such task, or its metric is not supported.
        DataError: The data cannot be fetched or read, or hold no examples for the prompts.
    """
    with restored_process(benchmark.where):
        built = build_tasks(benchmark)
        length = fit_length(benchmark, _language_models(pair), built.tasks)
        samples: dict[Side, list[Sample]] = {}
        for side in SIDES:
            answering = Answering(benchmark, length, progress, kept if side == "before" else None)
            with scoring(pair, side) as model, restored_model(model):
                samples[side] = _samples(wrapped_model(model, tokenizer, answering), benchmark, built)
    return _result(benchmark, tokenizer, samples, seed)


def _language_models(pair: ModelPair) -> list[PreTrainedModel]:
    """Returns both models, of which only the configs may be read."""
    models = []
    for side in SIDES:
        with scoring(pair, side) as model:
            if Head.of(model) is not None:
                raise RecipeError(
                    "evaluate",
                    got="a standard benchmark for a classifier",
                    wanted="a language model",
                    next_step="Score a classifier on a file: `file`, `text`, `answer` and `metric`.",
                )
            models.append(model)
    return models


def _samples(model: Any, benchmark: NamedBenchmark, built: Built) -> list[Sample]:
    """Runs lm-eval with one model."""
    from lm_eval.evaluator import evaluate

    # For tasks that sample their answers, and for checks that draw (IFEval's).
    torch.manual_seed(SEED)
    random.seed(SEED)
    np.random.seed(SEED)
    if built.runs is not None:
        built.runs.stopped.clear()
    for task in built.tasks.values():
        task.set_fewshot_seed(SEED)
    with recorded_shots(built) as shots, seeded_langdetect():
        results = evaluate(
            lm=model,
            task_dict={"tasks": dict(built.tasks), "groups": {}, "group_map": {}},
            limit=benchmark.examples,
            bootstrap_iters=0,  # the intervals are ours, of pairs
            log_samples=True,
        )
    return read_samples(benchmark, built, results["samples"], shots)


def _result(
    benchmark: NamedBenchmark,
    tokenizer: PreTrainedTokenizerBase,
    samples: Mapping[Side, Sequence[Sample]],
    seed: int,
) -> BenchmarkResult:
    first, second = samples["before"], samples["after"]
    assert [sample.prompt for sample in first] == [sample.prompt for sample in second]
    metric = first[0].metric
    records = records_of(tokenizer, first, second)
    if metric in ("f1", "matthews"):
        scores = _whole_scores(metric, first, second, seed) | {"n": len(records), "items": records}
    else:
        weights = [float(record.get("tokens", record.get("instructions", 1))) for record in records]
        scores = mean_scores(records, weights, seed)
    return BenchmarkResult(name=benchmark.name, role=cast(Role, benchmark.role), metric=metric, **scores)


def _whole_scores(metric: Metric, first: Sequence[Sample], second: Sequence[Sample], seed: int) -> dict[str, Any]:
    """Scores the labels of all items together."""
    truth, before = np.array([sample.value for sample in first]).T
    after = np.array([sample.value for sample in second])[:, 1]
    labels = max(2, int(max(truth.max(), before.max(), after.max())) + 1)
    return {
        "before": agreement(metric, truth, before, labels),
        "after": agreement(metric, truth, after, labels),
        "interval": agreement_interval(metric, truth, before, after, seed, labels),
        "kl_to_base": None,
        "groups": {},
    }
