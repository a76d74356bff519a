"""A standard benchmark scored with the base and with the tuned model by lm-eval, and compared item by item."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keeptune.core.errors import RecipeError
from keeptune.evaluation.base_answers import KeptAnswers
from keeptune.evaluation.benchmarks import Role
from keeptune.evaluation.metrics import Measure, Metric, agreement, agreement_interval
from keeptune.evaluation.model_pairs import SIDES, ModelPair, Side, scoring
from keeptune.evaluation.results import BenchmarkResult, mean_scores
from keeptune.evaluation.standard.entry import NamedBenchmark
from keeptune.evaluation.standard.language_model import fit_length, wrapped_model
from keeptune.evaluation.standard.lm_eval_tasks import SEED, Built, build_tasks, recorded_shots
from keeptune.evaluation.standard.restore import restored_model, restored_process, seeded_langdetect
from keeptune.model.head import Head

__all__ = ["score_named"]

# lm-eval's metrics of tasks that are not in the table.
_MEASURES: Mapping[str, Measure] = {
    "acc": "accuracy",
    "acc_norm": "accuracy_norm",
    "exact_match": "exact_match",
    "mcc": "matthews",
    "bits_per_byte": "cross_entropy",
}


@dataclass(frozen=True, slots=True)
class _Sample:
    """One item, as lm-eval ran and scored it with one model."""

    metric: Measure
    # A number; right and predicted label (f1, matthews); one per instruction; log-likelihood and bytes (cross_entropy).
    value: Any
    others: Mapping[str, float]  # the task's other metrics that are numbers
    prompt: str  # all that the model read before its answer, or of several choices before the first
    question: str  # the item alone, without description and examples
    target: Any  # what is right; of choices the index of the right one, or of all that are accepted
    group: str | None  # the subject, where there are several
    choices: tuple[str, ...]
    sums: tuple[float, ...]  # log-likelihoods of the choices
    text: str  # what the model wrote
    stopped: str | None  # what stopped a program; None where there is none
    shots: tuple[int, ...]  # the examples in the prompt, as rows of their split from 0


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

    Returns:
        The scores, their interval and the record of every item.

    Raises:
        RecipeError: lm-eval is missing, has no such task, or its metric is not supported.
        DataError: The data cannot be fetched or read, or hold no examples for the prompts.
    """
    with restored_process(benchmark.where):
        built = build_tasks(benchmark)
        length = fit_length(benchmark, _language_models(pair), built.tasks)
        samples: dict[Side, list[_Sample]] = {}
        for side in SIDES:
            answers = kept if side == "before" else None
            with scoring(pair, side) as model, restored_model(model):
                wrapped = wrapped_model(model, tokenizer, benchmark, length=length, progress=progress, kept=answers)
                samples[side] = _samples(wrapped, benchmark, built)
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


def _samples(model: Any, benchmark: NamedBenchmark, built: Built) -> list[_Sample]:
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
    return _read_samples(benchmark, built, results["samples"], shots)


def _result(
    benchmark: NamedBenchmark,
    tokenizer: PreTrainedTokenizerBase,
    samples: Mapping[Side, Sequence[_Sample]],
    seed: int,
) -> BenchmarkResult:
    first, second = samples["before"], samples["after"]
    assert [sample.prompt for sample in first] == [sample.prompt for sample in second]
    metric = first[0].metric
    records = _records(tokenizer, first, second)
    if metric in ("f1", "matthews"):
        scores = _whole_scores(metric, first, second, seed) | {"n": len(records), "items": records}
    else:
        weights = [float(record.get("tokens", record.get("instructions", 1))) for record in records]
        scores = mean_scores(records, weights, seed)
    return BenchmarkResult(name=benchmark.name, role=cast(Role, benchmark.role), metric=metric, **scores)


def _whole_scores(metric: Metric, first: Sequence[_Sample], second: Sequence[_Sample], seed: int) -> dict[str, Any]:
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


def _read_samples(
    benchmark: NamedBenchmark,
    built: Built,
    logged: Mapping[str, Sequence[Mapping[str, Any]]],
    shots: Mapping[str, Sequence[tuple[int, ...]]],
) -> list[_Sample]:
    """Returns one sample per item, task after task, from what lm-eval logged for each item and filter."""
    samples = []
    for leaf, task in built.tasks.items():
        metric, key, filtered = _measured(benchmark, leaf, logged[leaf][0])
        rows = sorted((row for row in logged[leaf] if row["filter"] == filtered), key=lambda row: row["doc_id"])
        group = None if len(built.tasks) == 1 else leaf.removeprefix(f"{benchmark.lm_eval_task}_")
        for at, (row, drawn) in enumerate(zip(rows, shots.get(leaf) or [()] * len(rows), strict=True)):
            kind = task.OUTPUT_TYPE
            compared = kind in ("multiple_choice", "loglikelihood")
            several = compared and task.multiple_input
            question = task.doc_to_text(row["doc"])
            arguments, responses = row["arguments"], row["resps"]
            sample = _Sample(
                metric=metric,
                value=row[key],
                others={name: float(row[name]) for name in row["metrics"] if isinstance(row[name], int | float)},
                prompt="" if kind == "loglikelihood_rolling" else str(arguments[0][0]),
                question=question if isinstance(question, str) else str(row["target"]),
                target=row["doc"].get("instruction_id_list", question if several else row["target"]),
                group=group,
                choices=tuple(str(given[0 if several else 1]).strip() for given in arguments) if compared else (),
                sums=tuple(float(response[0][0]) for response in responses) if compared else (),
                text=str(responses[0][0]) if kind == "generate_until" else "",
                stopped=built.runs.stopped[at] if built.runs is not None else None,
                shots=drawn,
            )
            samples.append(sample)
    return samples


def _measured(benchmark: NamedBenchmark, leaf: str, first: Mapping[str, Any]) -> tuple[Measure, str, str]:
    """Returns the metric as results name it, its name in lm-eval, and the filter under which it counts."""
    how = benchmark.how
    if how is not None:
        key, _, filtered = (how.key or f"{how.metric},none").partition(",")
        return how.metric, key, filtered
    for key in first["metrics"]:
        if key in _MEASURES:
            return _MEASURES[key], key, str(first["filter"])
    raise RecipeError(
        f"{benchmark.where}.task",
        got=f"{leaf}, which lm-eval measures by {', '.join(first['metrics'])}",
        wanted=f"one of {', '.join(_MEASURES)}",
        next_step="Choose another task, or score your own file with `file` and `metric`.",
    )


def _records(
    tokenizer: PreTrainedTokenizerBase, first: Sequence[_Sample], second: Sequence[_Sample]
) -> list[dict[str, Any]]:
    """Puts both models' samples side by side: one JSON-ready record per item."""
    records: list[dict[str, Any]] = []
    for index, (one, two) in enumerate(zip(first, second, strict=True)):
        record: dict[str, Any] = {"index": index, "group": one.group}
        if one.metric == "cross_entropy":
            # As lm-eval scores it: a start token that the tokenizer adds is predicted like any other.
            tokens = len(tokenizer(str(one.target), verbose=False)["input_ids"])
            record |= {"before": -one.value[0] / tokens, "after": -two.value[0] / tokens}
            record |= {"tokens": tokens, "bytes": one.value[1]}
        else:
            record |= {"before": _score(one), "after": _score(two)} | _answers(one, two)
        if one.metric == "instructions_followed":
            record["instructions"] = len(one.value)
        others = {name: [value, two.others[name]] for name, value in one.others.items() if name in two.others}
        if len(others) > 1:
            record["metrics"] = others
        records.append(record)
    return records


def _score(sample: _Sample) -> float:
    value = sample.value
    if sample.metric in ("f1", "matthews"):
        return float(value[0] == value[1])
    return sum(map(float, value)) / len(value) if isinstance(value, list) else float(value)


def _answers(one: _Sample, two: _Sample) -> dict[str, Any]:
    record: dict[str, Any] = {"prompt": one.question}
    if one.shots:
        record["shots"] = list(one.shots)
    right = one.target if isinstance(one.target, list) else [one.target]
    if one.choices:
        texts = [one.choices[index] if isinstance(index, int) else str(index) for index in right]
        record |= {"label": right[0], "answers": texts, "choices": list(one.choices)}
        return record | {"loglikelihoods_before": list(one.sums), "loglikelihoods_after": list(two.sums)}
    record |= {"answers": [str(answer) for answer in right], "text_before": one.text, "text_after": two.text}
    if one.stopped is not None:
        record |= {"program_before": one.stopped, "program_after": two.stopped}
    return record
