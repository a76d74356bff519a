"""Scoring a pair of models, language models or classifiers, before and after fine-tuning, on the same items."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keeptune.core.errors import DataError, ModelError, RecipeError, need_finite
from keeptune.core.processes import world
from keeptune.data.calibration import pad_id_of
from keeptune.data.chat_template import ChatTemplate
from keeptune.data.labelled import Texts, collator, label_indices
from keeptune.evaluation.benchmarks import Benchmark, FileBenchmark, asking, end_of_thought, ends_of_turns
from keeptune.evaluation.items import Item, load_items
from keeptune.evaluation.metrics import LABELS, PAIRS, SCORES, cut_at, exact_match
from keeptune.evaluation.model_pairs import (
    SIDES,
    KeptAnswers,
    ModelPair,
    Side,
    head_of_base,
    of_both,
    scoring,
    shared_positions,
)
from keeptune.evaluation.results import BenchmarkResult, grouped, label_scores, mean_scores
from keeptune.evaluation.scored_tokens import (
    Encoder,
    Passes,
    ScoredTokens,
    add_divergence,
    context_limit,
    greedy_texts,
    in_batches,
    log_likelihoods,
    losses_and_divergence,
)
from keeptune.evaluation.standard.entry import NamedBenchmark
from keeptune.evaluation.standard.score import score_named
from keeptune.model.head import Head

_LOG = logging.getLogger(__name__)
_Records = list[dict[str, Any]]
T = TypeVar("T", str, float)


def evaluate(
    pair: ModelPair,
    tokenizer: PreTrainedTokenizerBase,
    benchmark: Benchmark,
    folder: Path,
    *,
    seed: int = 0,
    kept: KeptAnswers | None = None,
) -> BenchmarkResult:
    """Scores a benchmark before and after fine-tuning.

    Its relative path starts from ``folder``; the ``seed`` is of the bootstrap interval, nothing else is random; without
    answers that are ``kept`` the base is run.
    """
    if isinstance(benchmark, NamedBenchmark):
        return score_named(pair, tokenizer, benchmark, seed=seed, kept=kept)
    assert isinstance(benchmark, FileBenchmark)
    items = load_items(benchmark, folder)
    passes = len(items) if benchmark.metric == "cross_entropy" else 2 * len(items)
    if benchmark.metric in ("multiple_choice", *PAIRS):
        passes = 2 * sum(len(item.choices) for item in items)
    passes = -(-passes // world())  # of the first process, whose bar is seen
    with tqdm(total=passes, desc=benchmark.name, unit="seq", disable=None, delay=2) as bar:
        chat = asking(benchmark, tokenizer) if benchmark.templated else None
        scorer = _Scorer(pair, tokenizer, benchmark, items, bar.update, kept, chat)
        if benchmark.metric in (*LABELS, *SCORES):
            return scorer.labelled(seed)
        head = head_of_base(pair)
        if head is not None:
            raise wrong_metric(benchmark, head)
        records = {
            "exact_match": scorer.generated,
            "multiple_choice": scorer.chosen,
            "cross_entropy": scorer.predicted,
            **dict.fromkeys(PAIRS, scorer.chosen),
        }[benchmark.metric]()
        if benchmark.role == "task" and benchmark.metric != "cross_entropy":
            scorer.add_divergence(records)
    named = [{"index": item.index, "group": item.group} | record for item, record in zip(items, records, strict=True)]
    weights = [float(record.get("tokens", 1.0)) for record in records]  # losses are weighted by tokens
    scores = mean_scores(named, weights, seed)
    return BenchmarkResult(
        name=benchmark.name, role=benchmark.role, metric=benchmark.metric, chat=benchmark.templated, **scores
    )


@dataclass(frozen=True, slots=True)
class _Scorer:
    pair: ModelPair
    tokenizer: PreTrainedTokenizerBase
    benchmark: FileBenchmark
    items: Sequence[Item]
    advance: Callable[[int], object]
    kept: KeptAnswers | None
    chat: ChatTemplate | None

    def generated(self) -> _Records:
        """Exact match of greedily generated answers."""
        benchmark = self.benchmark
        prompts = self._encoded(
            lambda encoder, item, where: [encoder.prompt(self._asked(item, where), where)], benchmark.max_new_tokens
        )
        thought = end_of_thought(benchmark, self.tokenizer)
        stops = () if thought else benchmark.stops  # a thought may hold them
        texts = self._both_sides(
            prompts,
            lambda model, passes: greedy_texts(
                model,
                self.tokenizer,
                prompts,
                passes,
                new_tokens=benchmark.max_new_tokens,
                stops=stops,
                ends=ends_of_turns(self.chat),
            ),
        )
        records = generated_records(benchmark, self.items, texts, thought)
        return [record | {"cut": tokens.cut} for record, tokens in zip(records, prompts, strict=True)]

    def chosen(self) -> _Records:
        """Accuracy of the likeliest choice, and of the likeliest per character."""
        sequences = self._encoded(self._choices)
        sums = self._both_sides(sequences, lambda model, passes: log_likelihoods(model, sequences, passes))
        records, place = chosen_records(self.items, sums), 0
        for item, record in zip(self.items, records, strict=True):
            end = place + len(item.choices)
            record["cut"] = any(tokens.cut for tokens in sequences[place:end])
            record |= _rewards(record) if self.benchmark.metric == "reward_accuracy" else {}
            place = end
        return records

    def _choices(self, encoder: Encoder, item: Item, where: str) -> list[ScoredTokens]:
        if item.pairs is None:
            return [encoder.choice(self._asked(item, where), text, where) for text in item.choices]
        rows = item.pairs.tokens(self.tokenizer if self.chat is None else self.chat.tokenizer, item.index)
        return [encoder.answered(row.ids, row.learned.index(True), "an answer", where) for row in rows]

    def predicted(self) -> _Records:
        """Cross-entropy and KL(base || tuned), nats per token of each document."""
        documents = self._encoded(lambda encoder, item, where: [self._document(encoder, item, where)])
        losses = losses_and_divergence(self.pair, documents, self._passes(self.benchmark.where))
        return [loss | {"cut": tokens.cut} for tokens, loss in zip(documents, losses, strict=True)]

    def labelled(self, seed: int) -> BenchmarkResult:
        """Scores labels or scores that both models predict; groups are scored where the score is a mean (accuracy)."""
        benchmark, items = self.benchmark, self.items
        head, tuned = of_both(self.pair, Head.of)
        if head is None or bool(head.labels) != (benchmark.metric in LABELS):
            raise wrong_metric(benchmark, head)
        if tuned is None or tuned.labels != head.labels:
            raise ModelError(
                benchmark.where,
                got=f"other labels after tuning than before ({', '.join(head.labels)})",
                wanted="the same labels in the same order",
                next_step="Load both models with the labels that the tuned one learned.",
            )
        names, limit = head.labels, min(benchmark.max_length, shared_positions(self.pair) or benchmark.max_length)
        seconds = tuple(item.text_pair for item in items if item.text_pair is not None)
        encoded, cut = Texts(tuple(item.text for item in items), seconds or None).encode(self.tokenizer, limit)
        if cut:
            _LOG.warning("%s: %d of %d sequences were cut to %d tokens.", benchmark.where, len(cut), len(items), limit)
        predicted, pad, sequences = {}, collator(self.tokenizer), encoded.to_list()

        def logits_of(members: Sequence[Mapping[str, Any]]) -> list[list[float]]:
            batch = {name: value.to(model.device) for name, value in pad(members).items()}
            found: list[list[float]] = model(**batch).logits.float().tolist()
            self.advance(len(members))
            return found

        for side in SIDES:
            with scoring(self.pair, side) as model:
                rows = in_batches(sequences, lambda row: len(row["input_ids"]), benchmark.batch_size, logits_of)
                logits = torch.tensor(rows)
            need_finite(logits.isfinite(), f"{benchmark.where} ({side})", "logits")
            predicted[side] = (logits.argmax(-1) if names else logits[:, 0]).numpy()
        if names:
            truth = np.array(label_indices([item.answers[0] for item in items], names, where=benchmark.where))
        else:
            truth = np.array([item.score for item in items], dtype=np.float64)
        records = [
            _record(item, names, truth[at], {s: v[at] for s, v in predicted.items()}) for at, item in enumerate(items)
        ]
        scores = label_scores(benchmark.metric, truth, predicted["before"], predicted["after"], len(names), seed)
        if benchmark.metric == "accuracy":
            before, after = ([float(record[side]) for record in records] for side in SIDES)
            scores["groups"] = grouped([item.group for item in items], before, after, [1.0] * len(items))
        return BenchmarkResult(
            name=benchmark.name, role=benchmark.role, metric=benchmark.metric, n=len(items), items=records, **scores
        )

    def add_divergence(self, records: _Records) -> None:
        """Adds KL(base || tuned) on the right answers, each after exactly one space."""
        limit = context_limit(self.benchmark.max_length, 0, shared_positions(self.pair), where=self.benchmark.where)
        encoder = Encoder(self.tokenizer, limit, self.benchmark.templated)
        answers = [item.choices[item.label] if item.label is not None else item.answers[0] for item in self.items]
        sequences = [
            encoder.answer(*encoder.joined(self._asked(item, self.benchmark.where), answer))
            if item.pairs is None
            else self._choices(encoder, item, self.benchmark.where)[0]
            for item, answer in zip(self.items, answers, strict=True)
        ]
        passes = replace(self._passes(self.benchmark.where), advance=lambda _: None)
        add_divergence(self.pair, records, sequences, passes)

    def _asked(self, item: Item, where: str) -> str:
        if item.chat is None or self.chat is None:
            return item.prompt
        return self.chat.asked(item.chat.messages, item.chat.tools, where=where)

    def _document(self, encoder: Encoder, item: Item, where: str) -> ScoredTokens:
        if item.chat is None or self.chat is None:
            return encoder.document(item.text, where)
        row = self.chat.row(item.chat, where=where)
        last = len(row.ids) - row.learned[::-1].index(True) if any(row.learned) else 0
        found = encoder.followed(row.ids[:last], row.learned.index(True)) if last else None
        if found is None:
            raise DataError(
                where,
                got=f"a last answer of which nothing can be scored {' '.join(row.lost)}",
                wanted="one that the chat template shows right after what asks for it",
                next_step="Change these messages, or leave the row out.",
            )
        return found

    def _both_sides(
        self, sequences: Sequence[ScoredTokens], compute: Callable[[PreTrainedModel, Passes], list[T]]
    ) -> dict[Side, list[T]]:
        def run(side: Side) -> list[T]:
            with scoring(self.pair, side) as model:
                return compute(model, self._passes(f"{self.benchmark.where} ({side})"))

        if self.kept is None:
            return {side: run(side) for side in SIDES}
        parts = [self.benchmark, [[tokens.ids, tokens.start] for tokens in sequences]]
        before = self.kept.get(self.benchmark.name, parts, len(sequences), lambda: run("before"))
        return {"before": before, "after": run("after")}

    def _passes(self, where: str) -> Passes:
        return Passes(self.benchmark.batch_size, pad_id_of(self.tokenizer), where, self.advance)

    def _encoded(
        self, encode: Callable[[Encoder, Item, str], list[ScoredTokens]], new_tokens: int = 0
    ) -> list[ScoredTokens]:
        where = self.benchmark.where
        limit = context_limit(self.benchmark.max_length, new_tokens, shared_positions(self.pair), where=where)
        encoder = Encoder(self.tokenizer, limit, self.benchmark.templated)
        sequences = [one for item in self.items for one in encode(encoder, item, f"{where} row {item.index + 1}")]
        cut = sum(tokens.cut for tokens in sequences)
        if cut:
            _LOG.warning("%s: %d of %d sequences were cut to %d tokens.", where, cut, len(sequences), limit)
        return sequences


def generated_records(
    benchmark: FileBenchmark, items: Sequence[Item], texts: Mapping[Side, Sequence[str]], thought: str | None
) -> _Records:
    """Returns the record of each item: its answers before and after (behind a thought), and whether they are right."""
    records: _Records = []
    for at, item in enumerate(items):
        own = {side: texts[side][at] for side in SIDES}
        if thought:
            own = {side: cut_at(own[side].split(thought)[-1].lstrip(), benchmark.stops) for side in SIDES}
        matches = {side: exact_match(own[side], item.answers, normalise=benchmark.normalise) for side in SIDES}
        record = {"prompt": item.prompt, "answers": list(item.answers)}
        records.append(matches | record | {f"text_{side}": own[side] for side in SIDES})
    return records


def chosen_records(items: Sequence[Item], sums: Mapping[Side, Sequence[float]]) -> _Records:
    """Returns the record of each item: the log-likelihoods of its choices, and whether the likeliest is right."""
    records, place = [], 0
    for item in items:
        end = place + len(item.choices)
        record: dict[str, Any] = {"label": item.label, "choices": list(item.choices)}
        for side in SIDES:
            own = sums[side][place:end]
            rates = [value / max(len(text), 1) for value, text in zip(own, item.choices, strict=True)]
            record[side] = float(own.index(max(own)) == item.label)
            record[f"acc_norm_{side}"] = float(rates.index(max(rates)) == item.label)
            record[f"loglikelihoods_{side}"] = list(own)
        records.append(record)
        place = end
    return records


def _rewards(record: Mapping[str, Any]) -> dict[str, float]:
    """Compares how much training raised the log-likelihood of a pair's answers: DPO's reward, but for a factor."""
    better, worse = (a - b for b, a in zip(*(record[f"loglikelihoods_{side}"] for side in SIDES), strict=True))
    likelier = {f"preference_accuracy_{side}": record[side] for side in SIDES}
    return {"before": 0.5, "after": 0.5 if better == worse else float(better > worse), **likelier}


def wrong_metric(benchmark: FileBenchmark, head: Head | None) -> RecipeError:
    """Returns the error of a metric that is not of this kind of model."""
    kind = "language model" if head is None else "classifier" if head.labels else "regression"
    return RecipeError(
        f"{benchmark.where}.metric",
        got=f"{benchmark.metric} for a {kind}",
        wanted="exact_match, multiple_choice or cross_entropy for a language model; accuracy, f1 or matthews for a "
        "classifier; pearson or spearman for a regression",
        next_step="Choose a metric for this kind of model.",
    )


def _record(item: Item, names: Sequence[str], truth: Any, predicted: Mapping[str, Any]) -> dict[str, Any]:
    record: dict[str, Any] = {"index": item.index, "group": item.group}
    if not names:
        return record | {side: float(value) for side, value in predicted.items()} | {"answer": float(truth)}
    record |= {side: float(value == truth) for side, value in predicted.items()} | {"answer": names[truth]}
    return record | {f"label_{side}": names[value] for side, value in predicted.items()}
