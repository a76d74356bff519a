"""A standard benchmark scored with the base and with the tuned model by lm-eval, and compared item by item."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from keeptune.core.errors import RecipeError
from keeptune.data.calibration import pad_id_of
from keeptune.evaluation.benchmarks import Role, ends_of_turns, template_of
from keeptune.evaluation.metrics import Measure
from keeptune.evaluation.model_pairs import SIDES, KeptAnswers, ModelPair, Side, head_of_base, scoring, shared_positions
from keeptune.evaluation.results import BenchmarkResult, divergence_of, label_scores, mean_scores
from keeptune.evaluation.scored_tokens import Encoder, Passes, add_divergence
from keeptune.evaluation.standard.entry import NamedBenchmark
from keeptune.evaluation.standard.language_model import (
    fit_length,
    restored_model,
    restored_process,
    seeded_langdetect,
    wrapped_model,
)
from keeptune.evaluation.standard.lm_eval_tasks import SEED, Built, build_tasks, recorded_shots

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
    task: Any  # lm-eval's
    row: Mapping[str, Any]  # what lm-eval logged
    metric: Measure
    # A number; right and predicted label (f1, matthews); one per instruction; log-likelihood and bytes (cross_entropy).
    value: Any
    group: str | None  # the subject, where there are several
    shots: tuple[int, ...]  # the examples in the prompt, as rows of their split from 0
    stopped: str | None  # what stopped a program; None where there is none

    @property
    def prompt(self) -> str:
        """All that the model read before its answer, or of several choices before the first."""
        return "" if self.task.OUTPUT_TYPE == "loglikelihood_rolling" else str(self.row["arguments"][0][0])

    @property
    def score(self) -> float:
        if self.metric in ("f1", "matthews"):
            return float(self.value[0] == self.value[1])
        if isinstance(self.value, list):
            return sum(map(float, self.value)) / len(self.value)
        return float(self.value)

    @property
    def others(self) -> dict[str, float]:
        """The task's metrics that are numbers."""
        return {name: float(self.row[name]) for name in self.row["metrics"] if isinstance(self.row[name], int | float)}


def score_named(
    pair: ModelPair,
    tokenizer: PreTrainedTokenizerBase,
    benchmark: NamedBenchmark,
    *,
    seed: int = 0,
    kept: KeptAnswers | None = None,
) -> BenchmarkResult:
    """Scores a standard benchmark before and after fine-tuning.

    Laws: models, tokenizer, random number generators, environment and loggers are left as they were; both models read
    the same prompts; the scores are lm-eval's own of the same answers.

    Raises:
        RecipeError: lm-eval is missing, has no such task, or its metric is not supported.
        DataError: The data cannot be fetched or read, or hold no examples for the prompts.
    """
    if head_of_base(pair) is not None:
        raise RecipeError(
            "evaluate",
            got="a standard benchmark for a classifier",
            wanted="a language model",
            next_step="Score a classifier on a file: `file`, `text`, `answer` and `metric`.",
        )
    with restored_process(benchmark.where):
        built = build_tasks(benchmark)
        chat = template_of(benchmark, tokenizer, built.tasks)
        length = fit_length(benchmark, shared_positions(pair), built.tasks)
        samples: dict[Side, list[_Sample]] = {}
        for side in SIDES:
            answers = kept if side == "before" else None
            with scoring(pair, side) as model, restored_model(model, ends_of_turns(chat)):
                wrapped = wrapped_model(model, tokenizer, benchmark, length=length, kept=answers, chat=chat)
                samples[side] = samples_of(wrapped, benchmark, built, chat=chat is not None)
        records = records_of(samples, tokenizer)
        if benchmark.role == "task" and (benchmark.how is None or benchmark.how.protocol is None):
            encoder = Encoder(tokenizer, length, templated=chat is not None)
            right = [encoder.answer(*_right(sample, chat=chat is not None)) for sample in samples["before"]]
            add_divergence(pair, records, right, Passes(benchmark.batch_size, pad_id_of(tokenizer), benchmark.where))
    return compared(benchmark, samples, records, chat=chat is not None, seed=seed)


def records_of(samples: Mapping[Side, list[_Sample]], tokenizer: Any) -> list[dict[str, Any]]:
    """Returns the record of each item, from the samples before and after."""
    pairs = list(zip(samples["before"], samples["after"], strict=True))
    assert all(one.prompt == two.prompt for one, two in pairs)
    return [_record(index, *both, tokenizer) for index, both in enumerate(pairs)]


def compared(
    benchmark: NamedBenchmark, samples: Mapping[Side, list[_Sample]], records: list[Any], *, chat: bool, seed: int
) -> BenchmarkResult:
    """Returns the scores before and after, with the interval of their difference over the items."""
    metric = samples["before"][0].metric
    if metric in ("f1", "matthews"):
        truth, before = np.array([sample.value for sample in samples["before"]]).T
        after = np.array([sample.value for sample in samples["after"]])[:, 1]
        labels = max(2, int(max(truth.max(), before.max(), after.max())) + 1)
        scores = label_scores(metric, truth, before, after, labels, seed) | {"n": len(records), "items": records}
        scores["kl_to_base"] = divergence_of(records, [1.0] * len(records))
    else:
        weights = [float(record.get("tokens", record.get("instructions", 1))) for record in records]
        scores = mean_scores(records, weights, seed)
    return BenchmarkResult(name=benchmark.name, role=cast(Role, benchmark.role), metric=metric, chat=chat, **scores)


def samples_of(model: Any, benchmark: NamedBenchmark, built: Built, *, chat: bool) -> list[_Sample]:
    """Has lm-eval ask one of its models for the answers."""
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
        logged = evaluate(
            lm=model,
            task_dict={"tasks": dict(built.tasks), "groups": {}, "group_map": {}},
            limit=benchmark.examples,
            bootstrap_iters=0,  # the intervals are ours, of pairs
            log_samples=True,
            system_instruction=benchmark.system,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )["samples"]
    samples = []
    for leaf, task in built.tasks.items():
        metric, key, filtered = _measured(benchmark, leaf, logged[leaf][0])
        rows = sorted((row for row in logged[leaf] if row["filter"] == filtered), key=lambda row: row["doc_id"])
        group = None if len(built.tasks) == 1 else leaf.removeprefix(f"{benchmark.lm_eval_task}_")
        drawn = shots.get(leaf) or [()] * len(rows)
        stopped = [None] * len(rows) if built.runs is None else built.runs.stopped
        for row, examples, reason in zip(rows, drawn, stopped, strict=True):
            samples.append(_Sample(task, row, metric, row[key], group, examples, reason))
    return samples


def _right(sample: _Sample, *, chat: bool) -> tuple[str, str]:
    """Returns what the model reads and the right text after it, which is empty where the task has none."""
    task, right, given = sample.task, sample.row["target"], sample.row["arguments"]
    right = right[0] if isinstance(right, list) and right else right
    if task.OUTPUT_TYPE == "multiple_choice":
        place = task.doc_to_text(sample.row["doc"]) if task.multiple_input else right
        return (given[place][0], given[place][1]) if isinstance(place, int) else ("", "")
    if task.OUTPUT_TYPE != "generate_until" or not isinstance(right, str) or sample.stopped is not None:
        return "", ""  # texts without a prompt, programs, and answers that are checked otherwise
    return given[0][0], ("" if chat else task.config.target_delimiter) + right


def _measured(benchmark: NamedBenchmark, leaf: str, first: Mapping[str, Any]) -> tuple[Measure, str, str]:
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


def _record(index: int, one: _Sample, two: _Sample, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    record: dict[str, Any] = {"index": index, "group": one.group}
    if one.metric == "cross_entropy":
        # As lm-eval scores it: a start token that the tokenizer adds is predicted like any other.
        tokens = len(tokenizer(str(one.row["target"]), verbose=False)["input_ids"])
        record |= {"before": -one.value[0] / tokens, "after": -two.value[0] / tokens}
        record |= {"tokens": tokens, "bytes": one.value[1]}
    else:
        record |= {"before": one.score, "after": two.score} | _answers(one, two)
    if one.metric == "instructions_followed":
        record["instructions"] = len(one.value)
    theirs = two.others
    others = {name: [value, theirs[name]] for name, value in one.others.items() if name in theirs}
    return record | {"metrics": others} if len(others) > 1 else record


def _answers(one: _Sample, two: _Sample) -> dict[str, Any]:
    row, compared = one.row, one.task.OUTPUT_TYPE in ("multiple_choice", "loglikelihood")
    several = compared and one.task.multiple_input  # one answer after several texts, as Winogrande has it
    question = one.task.doc_to_text(row["doc"])
    record: dict[str, Any] = {"prompt": question if isinstance(question, str) else str(row["target"])}
    if one.shots:
        record["shots"] = list(one.shots)
    # Of choices the index of the right one, or of all that are accepted.
    target = row["doc"].get("instruction_id_list", question if several else row["target"])
    right = target if isinstance(target, list) else [target]
    responses = {"before": one.row["resps"], "after": two.row["resps"]}
    if compared:
        choices = [str(given[0 if several else 1]).strip() for given in row["arguments"]]
        texts = [choices[index] if isinstance(index, int) else str(index) for index in right]
        record |= {"label": right[0], "answers": texts, "choices": choices}
        sums = {side: [float(response[0][0]) for response in own] for side, own in responses.items()}
        return record | {f"loglikelihoods_{side}": own for side, own in sums.items()}
    record["answers"] = [str(answer) for answer in right]
    record |= {f"text_{side}": str(own[0][0]) for side, own in responses.items()}
    if one.stopped is not None:
        record |= {"program_before": one.stopped, "program_after": two.stopped}
    return record
