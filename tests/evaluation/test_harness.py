from __future__ import annotations

import io
import json
import logging
import math
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from keeptune.core.errors import ModelError
from keeptune.evaluation import AdapterPair, BenchmarkResult, FileBenchmark, TwoModels, evaluate

# PEFT 0.21 asks transformers 5.23 for a property under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

STORIES = [
    {"text": "Once upon a time there was a big red cat. It sat on a mat.", "relation": "cat"},
    {"text": "Tom ran.", "relation": "tom"},
    {"text": "The sun was hot, so Lily sat down.", "relation": "cat"},
    {"text": "A dog and a bird were friends."},
]
QUESTIONS: list[dict[str, Any]] = [
    {
        "question": "Once upon a time, there was a little",
        "answer": ["girl named Lily", "boy"],
        "relation": "who",
    },
    {"question": "Tom and", "answer": "his mom", "relation": "who"},
    {"question": "The sun was hot, so Lily and her mom went to the", "answer": "park"},
]
CHOICES: list[dict[str, Any]] = [
    {"question": "Once upon a", "choices": ["time", "car", "blue"], "label": "A"},
    {"question": "The little girl was very", "choices": ["happy", "table"], "label": "B"},
    {"question": "Tom", "choices": ["was sad", "was a big boy", "ran"], "label": "C"},
]
FACTS: dict[str, Any] = {"name": "facts", "role": "knowledge", "file": "rows.jsonl"}


def exact(**extra: Any) -> FileBenchmark:
    fields = {"metric": "exact_match", "prompt": "{question}", "answer": "{answer}", "stop": (".", "\n", ",")}
    return FileBenchmark(**FACTS | fields | extra)


def multiple(**extra: Any) -> FileBenchmark:
    fields = {
        "metric": "multiple_choice",
        "prompt": "{question}",
        "choices": "{choices}",
        "answer": "{label}",
    }
    return FileBenchmark(**FACTS | fields | extra)


def crossed(**extra: Any) -> FileBenchmark:
    return FileBenchmark(**FACTS | {"metric": "cross_entropy", "text": "{text}"} | extra)


@pytest.fixture
def pair(stories: Any) -> AdapterPair:
    """stories260K with a random adapter, in training mode."""
    torch.manual_seed(2)
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.3, init_lora_weights=False)
    peft_model = get_peft_model(stories, config)
    with torch.no_grad():
        for name, weight in peft_model.named_parameters():
            if "lora_B" in name:
                weight.mul_(2.0)
    return AdapterPair(peft_model.train())


CASES = [(exact(), QUESTIONS), (multiple(), CHOICES), (crossed(), STORIES)]


@pytest.mark.parametrize(("benchmark", "rows"), CASES)
def test_batch_size_does_not_matter(
    pair: AdapterPair, tokenizer: Any, write: Any, benchmark: FileBenchmark, rows: Any
) -> None:
    folder = write(rows)
    whole = evaluate(pair, tokenizer, benchmark, folder)
    single = evaluate(pair, tokenizer, replace(benchmark, batch_size=1), folder)
    assert whole.before == pytest.approx(single.before, abs=1e-5)
    assert whole.after == pytest.approx(single.after, abs=1e-5)
    assert whole.interval == pytest.approx(single.interval, abs=1e-5)
    for first, second in zip(whole.items, single.items, strict=True):
        assert first.get("text_after") == second.get("text_after")


@pytest.mark.parametrize(("benchmark", "rows"), CASES)
def test_results_are_json_and_round_trip(
    pair: AdapterPair, tokenizer: Any, write: Any, benchmark: FileBenchmark, rows: Any
) -> None:
    result = evaluate(pair, tokenizer, benchmark, write(rows))
    summary = json.loads(json.dumps(result.summary(), allow_nan=False))
    assert BenchmarkResult.from_jsonl(summary, result.to_jsonl()) == result
    assert [item["index"] for item in result.items] == list(range(len(rows)))
    assert result.n == len(rows)
    assert result.interval[0] - 1e-9 <= result.after - result.before <= result.interval[1] + 1e-9
    assert (result.kl_to_base is None) == (benchmark.metric != "cross_entropy")


@pytest.mark.parametrize(("benchmark", "rows"), CASES)
def test_a_model_beside_itself_does_not_change(
    stories: Any, tokenizer: Any, write: Any, benchmark: FileBenchmark, rows: Any
) -> None:
    result = evaluate(TwoModels(stories, stories), tokenizer, benchmark, write(rows))
    assert result.before == result.after
    assert result.interval == (0.0, 0.0)
    assert result.kl_to_base in (None, 0.0)


@pytest.mark.parametrize(("benchmark", "rows"), CASES)
def test_two_models_equal_the_adapter(
    pair: AdapterPair, tokenizer: Any, write: Any, benchmark: FileBenchmark, rows: Any
) -> None:
    folder = write(rows)
    result = evaluate(pair, tokenizer, benchmark, folder)
    with pair.before() as model, pair.after() as same:
        assert model is same
    base = deepcopy(pair.peft_model).unload()
    tuned = deepcopy(pair.peft_model).merge_and_unload()
    merged = evaluate(TwoModels(base, tuned), tokenizer, benchmark, folder)
    assert merged.before == pytest.approx(result.before, abs=1e-5)
    assert merged.after == pytest.approx(result.after, abs=1e-5)


def test_exact_match_against_the_reference(stories: Any, tiny: Any, tokenizer: Any, write: Any, reference: Any) -> None:
    result = evaluate(TwoModels(stories, tiny), tokenizer, exact(max_new_tokens=12), write(QUESTIONS))
    stops = (".", "\n", ",")
    for model, ends, side in ((stories, {1, 2}, "before"), (tiny, {2}, "after")):
        for row, item in zip(QUESTIONS, result.items, strict=True):
            text = reference.greedy_text(model, tokenizer, row["question"], new_tokens=12, ends=ends, stops=stops)
            assert item[f"text_{side}"] == text
            answers = row["answer"] if isinstance(row["answer"], list) else [row["answer"]]
            assert item[side] == float(text.strip().lower() in [answer.lower() for answer in answers])
    assert result.before > result.after == 0
    assert result.groups["who"]["n"] == 2


def test_multiple_choice_against_the_reference(
    stories: Any, tiny: Any, tokenizer: Any, write: Any, reference: Any
) -> None:
    result = evaluate(TwoModels(stories, tiny), tokenizer, multiple(), write(CHOICES))
    for model, side in ((stories, "before"), (tiny, "after")):
        hits = []
        for row, item, label in zip(CHOICES, result.items, (0, 1, 2), strict=True):
            sums = [reference.choice_log_likelihood(model, tokenizer, row["question"], text) for text in row["choices"]]
            assert item[f"loglikelihoods_{side}"] == pytest.approx(sums, abs=2e-5)
            rates = [value / len(text) for value, text in zip(sums, row["choices"], strict=True)]
            assert item[side] == float(max(range(len(sums)), key=sums.__getitem__) == label)
            assert item[f"acc_norm_{side}"] == float(max(range(len(sums)), key=rates.__getitem__) == label)
            assert item["label"] == label
            hits.append(item[side])
        assert getattr(result, side) == pytest.approx(sum(hits) / 3)


def test_cross_entropy_against_the_reference(
    stories: Any, tiny: Any, tokenizer: Any, write: Any, reference: Any
) -> None:
    result = evaluate(TwoModels(stories, tiny), tokenizer, crossed(max_length=12), write(STORIES))
    totals = {"before": 0.0, "after": 0.0, "kl": 0.0}
    tokens = 0
    for row, item in zip(STORIES, result.items, strict=True):
        whole = tokenizer(row["text"])["input_ids"]
        ids = whole[:12]
        assert item["tokens"] == len(ids) - 1
        assert item["cut"] == (len(whole) > 12)
        totals["before"] -= reference.log_likelihood(stories, ids, 1)
        totals["after"] -= reference.log_likelihood(tiny, ids, 1)
        totals["kl"] += reference.divergence(stories, tiny, ids)
        tokens += len(ids) - 1
    assert result.before == pytest.approx(totals["before"] / tokens, rel=1e-5)
    assert result.after == pytest.approx(totals["after"] / tokens, rel=1e-5)
    assert result.kl_to_base == pytest.approx(totals["kl"] / tokens, rel=1e-4)
    assert result.before < result.after
    assert set(result.groups) == {"cat", "tom"}


def _divergence(reference: Any, models: tuple[Any, Any], tokenizer: Any, prompt: str, answer: str) -> tuple[float, int]:
    whole, start = tokenizer(prompt + answer)["input_ids"], len(tokenizer(prompt)["input_ids"])
    total = reference.divergence(*models, whole) - reference.divergence(*models, whole[:start])
    return total, len(whole) - start


@pytest.mark.parametrize(("benchmark", "rows"), [(exact(role="task"), QUESTIONS), (multiple(role="task"), CHOICES)])
def test_a_tasks_divergence_is_that_of_its_right_answers(
    stories: Any, tiny: Any, tokenizer: Any, write: Any, reference: Any, benchmark: FileBenchmark, rows: Any
) -> None:
    result = evaluate(TwoModels(stories, tiny), tokenizer, replace(benchmark, max_length=200), write(rows))
    right = ["girl named Lily", "his mom", "park"] if rows is QUESTIONS else ["time", "table", "ran"]
    sums = [
        _divergence(reference, (stories, tiny), tokenizer, row["question"], f" {answer}")
        for row, answer in zip(rows, right, strict=True)
    ]
    assert [item["kl_tokens"] for item in result.items] == [count for _, count in sums]
    assert [item["kl"] for item in result.items] == pytest.approx([kl / count for kl, count in sums], rel=1e-4)
    assert result.kl_to_base == pytest.approx(sum(kl for kl, _ in sums) / sum(count for _, count in sums), rel=1e-4)
    other_way = evaluate(TwoModels(tiny, stories), tokenizer, benchmark, write(rows)).kl_to_base
    assert result.kl_to_base != pytest.approx(other_way, rel=1e-2)  # forward: the base's expectation
    kept = replace(benchmark, role="knowledge")
    assert evaluate(TwoModels(stories, tiny), tokenizer, kept, write(rows)).kl_to_base is None


def test_cuts_are_reported_and_the_models_positions_count(
    stories: Any, tokenizer: Any, write: Any, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"text": "The cat sat on the mat. " * 200}, {"text": "Tom ran."}]
    with caplog.at_level(logging.WARNING):
        result = evaluate(TwoModels(stories, stories), tokenizer, crossed(), write(rows))
    assert "evaluate.facts: 1 of 2 sequences were cut to 512 tokens" in caplog.text
    assert result.items[0]["tokens"] == 511
    with caplog.at_level(logging.WARNING):
        rows = [{"question": "The cat sat on the mat. " * 200, "answer": "x"}]
        evaluate(TwoModels(stories, stories), tokenizer, exact(), write(rows))
    assert "1 of 1 sequences were cut to 480 tokens" in caplog.text


def test_the_tokenizer_is_left_alone(pair: AdapterPair, tokenizer: Any, write: Any) -> None:
    tokenizer.padding_side = "right"
    before = (tokenizer.padding_side, tokenizer.truncation_side, tokenizer.pad_token_id)
    state = tokenizer.backend_tokenizer.to_str()
    evaluate(pair, tokenizer, exact(), write(QUESTIONS))
    assert before == (tokenizer.padding_side, tokenizer.truncation_side, tokenizer.pad_token_id)
    assert tokenizer.backend_tokenizer.to_str() == state


def test_the_seed_decides_the_interval_and_nothing_else(pair: AdapterPair, tokenizer: Any, write: Any) -> None:
    folder = write([{"text": STORIES[0]["text"][:end]} for end in range(20, 56, 2)])  # too many to draw all samples
    torch.manual_seed(0)
    first = evaluate(pair, tokenizer, crossed(), folder, seed=1)
    drawn = torch.rand(1)
    second = evaluate(pair, tokenizer, crossed(), folder, seed=1)
    assert first == second
    third = evaluate(pair, tokenizer, crossed(), folder, seed=2)
    assert third.interval != first.interval
    assert replace(third, interval=first.interval) == first
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), drawn)


@pytest.mark.parametrize(("benchmark", "rows"), CASES)
def test_nan_names_the_benchmark_and_the_side(
    stories: Any, tiny: Any, tokenizer: Any, write: Any, benchmark: FileBenchmark, rows: Any
) -> None:
    tiny.model.norm.weight.data[0] = math.nan
    with pytest.raises(ModelError, match=r"evaluate\.facts \(after\)"):
        evaluate(TwoModels(stories, tiny), tokenizer, benchmark, write(rows))


def test_no_bar_without_a_terminal(stories: Any, tokenizer: Any, write: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    evaluate(TwoModels(stories, stories), tokenizer, crossed(), write(STORIES))
    assert stream.getvalue() == ""


def test_an_absolute_path_is_taken_as_it_is(stories: Any, tokenizer: Any, write: Any) -> None:
    folder = write(STORIES)
    benchmark = crossed(file=str(folder / "rows.jsonl"))
    assert evaluate(TwoModels(stories, stories), tokenizer, benchmark, Path("/nowhere")).n == 4
