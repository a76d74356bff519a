"""lm-eval's samples as records of ours: what was asked, what each model answered, what it scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from keeptune.core.errors import RecipeError
from keeptune.evaluation.benchmarks import Measure
from keeptune.evaluation.standard.catalogue import Scoring
from keeptune.evaluation.standard.entry import NamedBenchmark
from keeptune.evaluation.standard.lm_eval_tasks import Built

__all__ = ["Sample", "read_samples", "records_of"]

# Of tasks that are not in the table: lm-eval's metric and ours.
_MEASURES: Mapping[str, Measure] = {
    "acc": "accuracy",
    "acc_norm": "accuracy_norm",
    "exact_match": "exact_match",
    "mcc": "matthews",
    "bits_per_byte": "cross_entropy",
}


@dataclass(frozen=True, slots=True)
class Sample:
    """One item, as lm-eval asked and scored it with one model.

    Args:
        metric: The metric.
        value: Its value, of an item: a number; right and said label (f1, matthews); a list, one per instruction;
            log-likelihood and bytes (cross_entropy).
        others: The task's other metrics that are numbers.
        prompt: All that the model read before its answer, or of several choices before the first.
        question: The item alone, without description and examples.
        target: What is right; of choices the index of the right one, or of all that are accepted.
        group: The subject, where there are several.
        choices: Texts whose log-likelihoods were compared.
        sums: Their log-likelihoods.
        text: What the model wrote.
        said: What stopped a program.
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
    said: str | None
    shots: tuple[int, ...]


def read_samples(
    benchmark: NamedBenchmark,
    built: Built,
    logged: Mapping[str, Sequence[Mapping[str, Any]]],
    said: Sequence[str],
    shots: Mapping[str, Sequence[tuple[int, ...]]],
) -> list[Sample]:
    """Read what lm-eval logged.

    Args:
        benchmark: The benchmark.
        built: Its tasks.
        logged: Task to its samples, one for each item and filter.
        said: What stopped each program, in the order of the items; empty where there are none.
        shots: Task to the examples of each item's prompt; empty where there are none.

    Returns:
        One sample per item, task after task, in the order of the items.

    Raises:
        RecipeError: The task is measured in a way that is not known here.
    """
    found = []
    for leaf, task in built.tasks.items():
        how, key, chosen = _measured(benchmark, leaf, logged[leaf])
        own = sorted((row for row in logged[leaf] if row["filter"] == chosen), key=lambda row: row["doc_id"])
        group = None if len(built.tasks) == 1 else leaf.removeprefix(f"{benchmark.lm_eval_task}_")
        drawn = shots.get(leaf) or [()] * len(own)
        found += [
            replace(_sample(how, key, task, row, group), said=said[at] if said else None, shots=drawn[at])
            for at, row in enumerate(own)
        ]
    return found


def _measured(benchmark: NamedBenchmark, leaf: str, rows: Sequence[Mapping[str, Any]]) -> tuple[Measure, str, str]:
    """Say which of lm-eval's metrics counts, under which filter, and how results name it."""
    how = benchmark.how
    first = rows[0]
    if how is not None:
        key, chosen = _key(how)
        assert chosen in {str(row["filter"]) for row in rows}
        return how.metric, key, chosen
    for key in first["metrics"]:
        if key in _MEASURES:
            return _MEASURES[key], key, str(first["filter"])
    raise RecipeError(
        f"{benchmark.where}.task",
        got=f"{leaf}, which lm-eval measures by {', '.join(first['metrics'])}",
        wanted=f"one of {', '.join(_MEASURES)}",
        next_step="Choose another task, or score your own file with `file` and `metric`.",
    )


def _key(how: Scoring) -> tuple[str, str]:
    if how.key is None:
        return how.metric, "none"
    key, _, chosen = how.key.partition(",")
    return key, chosen


def _sample(metric: Measure, key: str, task: Any, row: Mapping[str, Any], group: str | None) -> Sample:
    arguments, responses = row["arguments"], row["resps"]
    kind = task.OUTPUT_TYPE
    compared = kind in ("multiple_choice", "loglikelihood")
    several = compared and task.multiple_input
    question = task.doc_to_text(row["doc"])
    return Sample(
        metric=metric,
        value=row[key],
        others={name: float(row[name]) for name in row["metrics"] if isinstance(row[name], int | float)},
        prompt="" if kind == "loglikelihood_rolling" else str(arguments[0][0]),
        question=question if isinstance(question, str) else str(row["target"]),
        target=row["doc"].get("instruction_id_list", question if several else row["target"]),
        group=group,
        choices=tuple(str(given[0] if several else given[1]).strip() for given in arguments) if compared else (),
        sums=tuple(float(found[0][0]) for found in responses) if compared else (),
        text=str(responses[0][0]) if kind == "generate_until" else "",
        said=None,
        shots=(),
    )


def records_of(
    benchmark: NamedBenchmark, tokenizer: PreTrainedTokenizerBase, first: Sequence[Sample], second: Sequence[Sample]
) -> list[dict[str, Any]]:
    """Put both models' samples side by side.

    Args:
        benchmark: The benchmark.
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
            size = one.value[1]
            record |= {"before": -one.value[0] / tokens, "after": -two.value[0] / tokens}
            record |= {"tokens": tokens, "bytes": size}
        else:
            record |= {"before": _mark(one), "after": _mark(two)}
            record |= _answers(one, two)
        if one.metric == "instructions_followed":
            record["instructions"] = len(one.value)
        others = {name: [value, two.others[name]] for name, value in one.others.items() if name in two.others}
        if len(others) > 1:
            record["metrics"] = others
        records.append(record)
    return records


def _mark(sample: Sample) -> float:
    value = sample.value
    if sample.metric in ("f1", "matthews"):
        return float(value[0] == value[1])
    return sum(map(float, value)) / len(value) if isinstance(value, list) else float(value)


def _answers(one: Sample, two: Sample) -> dict[str, Any]:
    found: dict[str, Any] = {"prompt": one.question}
    if one.shots:
        found["shots"] = list(one.shots)
    if one.choices:
        right = one.target if isinstance(one.target, list) else [one.target]
        texts = [one.choices[index] if isinstance(index, int) else str(index) for index in right]
        found |= {"label": right[0], "answers": texts, "choices": list(one.choices)}
        return found | {"loglikelihoods_before": list(one.sums), "loglikelihoods_after": list(two.sums)}
    right = one.target if isinstance(one.target, list) else [one.target]
    found |= {"answers": [str(answer) for answer in right], "text_before": one.text, "text_after": two.text}
    if one.said is not None:
        found |= {"program_before": one.said, "program_after": two.said}
    return found
