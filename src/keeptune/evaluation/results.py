"""Results of benchmarks: the scores, their interval, and one record per item."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

from numpy.typing import NDArray

from keeptune.core.artefact import as_written
from keeptune.core.bootstrap import paired_interval
from keeptune.core.errors import StatisticsError
from keeptune.evaluation.benchmarks import Role
from keeptune.evaluation.metrics import Measure, Metric, agreement, agreement_interval, harmonic, mean_ratio


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult:
    """Scores of one benchmark before and after fine-tuning."""

    name: str
    role: Role
    metric: Measure
    n: int  # items
    before: float  # the base model's score: the share of right answers, or nats per token
    after: float
    interval: tuple[float, float]  # of after - before, 95%
    kl_to_base: float | None  # KL(base || tuned), nats per token: of documents, or of a task's right answers
    groups: Mapping[str, Mapping[str, float]]  # name to {"n", "before", "after"}
    items: Sequence[Mapping[str, Any]]  # JSON-ready, with at least index, group, before and after
    chat: bool = False  # asked through the chat template

    def summary(self) -> dict[str, Any]:
        """Returns everything but the items, ready for JSON."""
        values = {field: getattr(self, field) for field in _SUMMARY}
        groups = {name: dict(entry) for name, entry in self.groups.items()}
        return values | {"interval": list(self.interval), "groups": groups}

    def to_jsonl(self) -> str:
        """Returns the items' records, one JSON object a line."""
        return "".join(json.dumps(dict(item), ensure_ascii=False, allow_nan=False) + "\n" for item in self.items)

    @classmethod
    def from_jsonl(cls, summary: Mapping[str, Any], text: str) -> Self:
        """Returns the result that was written.

        Raises:
            ArtefactError: The summary lacks a key, a line is not JSON, or the number of items is another.
        """
        with as_written("evaluation result", "the files that keeptune evaluate wrote", "Evaluate again."):
            # Not splitlines: it also splits at U+2028, which may stand inside a JSON string.
            items = [json.loads(line) for line in text.split("\n") if line]
            values = {field: ({"chat": False} | dict(summary))[field] for field in _SUMMARY}
            if len(items) != values["n"]:
                raise ValueError(f"{len(items)} items of {values['name']}, not {values['n']}")
            values |= {side: float(values[side]) for side in ("before", "after")}
            low, high = map(float, values.pop("interval"))
            return cls(**values, interval=(low, high), items=items)


_SUMMARY = tuple(field.name for field in fields(BenchmarkResult) if field.name != "items")


def trade_off(
    results: Sequence[BenchmarkResult], full: Sequence[BenchmarkResult] | None = None
) -> dict[str, float | None]:
    """Computes FARSS's K, T and KT, and LoKI's average forgetting ``1 - K`` (negative if something was gained).

    T and KT rest on ``full``, the results of full fine-tuning on the same benchmarks.

    Returns:
        ``{"K", "average_forgetting", "T", "KT"}``; None where a score cannot be computed.

    Raises:
        StatisticsError: ``full`` lacks a task benchmark, or has it on other items.
    """
    knowledge = [(one.name, one.metric, one.after, one.before) for one in results if one.role == "knowledge"]
    kept = mean_ratio(knowledge, "K", "the model scored 0 on it before fine-tuning")
    scores = {"K": kept, "average_forgetting": None if kept is None else 1.0 - kept}
    if full is None:
        return {**scores, "T": None, "KT": None}
    references = {(one.name, one.metric, one.n): one.after for one in full}
    tasks = [one for one in results if one.role == "task"]
    for one in tasks:
        if (one.name, one.metric, one.n) not in references:
            raise StatisticsError(
                f"T, benchmark {one.name}",
                got="no result of full fine-tuning with this name, metric and number of items",
                wanted="the same task benchmarks for both runs",
                next_step="Evaluate the full fine-tuning run with this recipe's evaluate list.",
            )
    learned = mean_ratio(
        [(one.name, one.metric, one.after, references[one.name, one.metric, one.n]) for one in tasks],
        "T",
        "full fine-tuning scored 0 on it",
    )
    return {**scores, "T": learned, "KT": harmonic(kept, learned)}


def references_by_seed(full: Iterable[tuple[int, Sequence[BenchmarkResult]]]) -> dict[int, Sequence[BenchmarkResult]]:
    """Returns for each seed the full fine-tuning that learned the tasks best, so that T is never flattered."""
    best: dict[int, Sequence[BenchmarkResult]] = {}
    for seed, results in full:
        if seed not in best or (trade_off(results, best[seed])["T"] or 0) > 1:
            best[seed] = results
    return best


def interval_between(first: BenchmarkResult, second: BenchmarkResult, seed: int) -> tuple[float, float]:
    """Returns the 95% interval of ``second.after - first.after``, means over the same items by two models."""
    weights = [float(item.get("tokens", 1)) for item in first.items]
    before, after = (
        [item["after"] * weight for item, weight in zip(result.items, weights, strict=True)]
        for result in (first, second)
    )
    return paired_interval(before, after, seed, weights=weights)


def mean_scores(records: Sequence[Mapping[str, Any]], weights: Sequence[float], seed: int) -> dict[str, Any]:
    """Computes the fields of a result that are means over items.

    Args:
        records: The items' records, with group, before, after, and kl where KL(base || tuned) is measured.
        weights: (n,) weight of each item: 1 for a score, the number of tokens for a mean loss.
        seed: Seed of the bootstrap interval.

    Returns:
        ``n``, ``before``, ``after``, ``interval``, ``kl_to_base``, ``groups`` and ``items``.
    """
    before, after = (
        [record[field] * weight for record, weight in zip(records, weights, strict=True)]
        for field in ("before", "after")
    )
    return {
        "n": len(records),
        "before": _rate(before, weights),
        "after": _rate(after, weights),
        "interval": paired_interval(before, after, seed, weights=weights),
        "kl_to_base": divergence_of(records, weights),
        "groups": grouped([record["group"] for record in records], before, after, weights),
        "items": records,
    }


def divergence_of(records: Sequence[Mapping[str, Any]], weights: Sequence[float]) -> float | None:
    """Returns the mean of the items' KL(base || tuned) over its tokens, their weights elsewhere; None without any."""
    pairs = zip(records, weights, strict=True)
    found = [(record["kl"], record.get("kl_tokens", weight)) for record, weight in pairs if "kl" in record]
    return _rate([kl * tokens for kl, tokens in found], [tokens for _, tokens in found]) if found else None


def grouped(
    groups: Sequence[str | None], before: Sequence[float], after: Sequence[float], weights: Sequence[float]
) -> dict[str, dict[str, float]]:
    """Returns each group's ``{"n", "before", "after"}``, in the order of first appearance.

    All are (n,): groups (None is left out), sums before and after, and what each is divided by: 1 for a score, the
    number of tokens for losses.
    """
    members: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        if group is not None:
            members.setdefault(group, []).append(index)
    rates = {}
    for group, chosen in members.items():
        own = [weights[i] for i in chosen]
        first, second = (_rate([side[i] for i in chosen], own) for side in (before, after))
        rates[group] = {"n": len(chosen), "before": first, "after": second}
    return rates


def label_scores(
    metric: Metric, truth: NDArray[Any], before: NDArray[Any], after: NDArray[Any], labels: int, seed: int
) -> dict[str, Any]:
    """Returns the fields of a result that score all (n,) labels, or a regression's scores, together; without groups."""
    return {
        "before": agreement(metric, truth, before, labels),
        "after": agreement(metric, truth, after, labels),
        "interval": agreement_interval(metric, truth, before, after, seed, labels),
        "kl_to_base": None,
        "groups": {},
    }


def _rate(sums: Sequence[float], weights: Sequence[float]) -> float:
    return math.fsum(sums) / math.fsum(weights)
