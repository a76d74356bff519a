"""lm-eval's samples as records of keeptune: the prompt, each model's answer, and its score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from keeptune.core.errors import RecipeError
from keeptune.evaluation.metrics import Measure
from keeptune.evaluation.standard.entry import NamedBenchmark
from keeptune.evaluation.standard.lm_eval_tasks import Built

__all__ = ["Sample", "read_samples", "records_of"]

# lm-eval's metrics of tasks that are not in the table.
_MEASURES: Mapping[str, Measure] = {
    "acc": "accuracy",
    "acc_norm": "accuracy_norm",
    "exact_match": "exact_match",
    "mcc": "matthews",
    "bits_per_byte": "cross_entropy",
}


@dataclass(frozen=True, slots=True)
class Sample:
    """One item, as lm-eval ran and scored it with one model.

    Args:
        metric: The metric.
        value: Its value, of an item: a number; right and predicted label (f1, matthews); a list, one per instruction;
            log-likelihood and bytes (cross_entropy).
        others: The task's other metrics that are numbers.
        prompt: All that the model read before its answer, or of several choices before the first.
        question: The item alone, without description and examples.
        target: What is right; of choices the index of the right one, or of all that are accepted.
        group: The subject, where there are several.
        choices: Texts whose log-likelihoods were compared.
        sums: Their log-likelihoods.
        text: What the model wrote.
        stopped: What stopped a program; None where there is none.
        shots: The examples in the prompt, as rows of their split from 0.
    """

    metric: Measure
    value: Any
    others: Mapping[str, float]
    prompt: str
    question: str
    target: Any
    group: str | None
    choices: tuple[str, ...]
    sums: tuple[float, ...]
    text: str
    stopped: str | None
    shots: tuple[int, ...]


def read_samples(
    benchmark: NamedBenchmark,
    built: Built,
    logged: Mapping[str, Sequence[Mapping[str, Any]]],
    shots: Mapping[str, Sequence[tuple[int, ...]]],
) -> list[Sample]:
    """Reads what lm-eval logged.

    Args:
        benchmark: The benchmark.
        built: Its tasks.
        logged: Task to its samples, one for each item and filter.
        shots: Task to the examples of each item's prompt; empty where there are none.

    Returns:
        One sample per item, task after task, in the order of the items.

    Raises:
        RecipeError: The task is measured in a way that is not supported.
    """
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
            sample = Sample(
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


def records_of(
    tokenizer: PreTrainedTokenizerBase, first: Sequence[Sample], second: Sequence[Sample]
) -> list[dict[str, Any]]:
    """Puts both models' samples side by side.

    Args:
        tokenizer: Counts the tokens of documents.
        first: Samples of the base.
        second: Samples of the tuned model, of the same items.

    Returns:
        One JSON-ready record per item.
    """
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


def _score(sample: Sample) -> float:
    value = sample.value
    if sample.metric in ("f1", "matthews"):
        return float(value[0] == value[1])
    return sum(map(float, value)) / len(value) if isinstance(value, list) else float(value)


def _answers(one: Sample, two: Sample) -> dict[str, Any]:
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
