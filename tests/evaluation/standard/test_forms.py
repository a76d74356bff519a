"""The benchmarks whose data are not at hand, on hand-made rows in the form that the hub's have."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn import metrics

from keeptune.evaluation import AdapterPair, NamedBenchmark
from keeptune.evaluation.standard import score_named

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

WORDS = ["cat", "dog", "big", "red", "sun", "mat"]
PAIRS = [{"a": f"The {word} ran.", "b": f"A {word} sat.", "label": place % 2} for place, word in enumerate(WORDS)]
ROWS: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "triviaqa": ("validation", [{"question": "Who ran", "answer": {"aliases": ["Tom", "Lily"]}}]),
    "hellaswag": (
        "validation",
        [
            {"activity_label": "Play", "ctx_a": "A dog [title] ran.", "ctx_b": "then it", "ctx": "A dog ran. then it",
             "endings": ["sat.", "ate a car.", "was.", "red."], "label": "0"}
        ],
    ),
    "winogrande": (
        "validation",
        [
            {"sentence": "Tom saw _ in the park.", "option1": "Lily", "option2": "car", "answer": "1"},
            {"sentence": "Lily gave _ to Tom.", "option1": "sun", "option2": "a ball", "answer": "2"},
        ],
    ),
    "arc_challenge": (
        "test",
        [{"question": "What is red?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"}],
    ),
    "piqa": ("validation", [{"goal": "Play", "sol1": "run", "sol2": "sit down", "label": 1}]),
    "cola": ("validation", [{"sentence": row["a"], "label": row["label"]} for row in PAIRS]),
    "sst2": ("validation", [{"sentence": row["a"], "label": row["label"]} for row in PAIRS]),
    "mnli": ("validation_matched", [{"premise": r["a"], "hypothesis": r["b"], "label": r["label"]} for r in PAIRS]),
    "mnli_mismatch": ("validation_mismatched", [{"premise": "A.", "hypothesis": "B.", "label": 2}]),
    "mrpc": ("validation", [{"sentence1": r["a"], "sentence2": r["b"], "label": r["label"]} for r in PAIRS]),
    "qnli": ("validation", [{"question": "Who ran?", "sentence": r["a"], "label": r["label"]} for r in PAIRS]),
    "qqp": ("validation", [{"question1": r["a"], "question2": r["b"], "label": r["label"]} for r in PAIRS]),
    "rte": ("validation", [{"sentence1": r["a"], "sentence2": r["b"], "label": r["label"]} for r in PAIRS]),
    "wnli": ("validation", [{"sentence1": r["a"], "sentence2": r["b"], "label": r["label"]} for r in PAIRS]),
}  # fmt: skip
METRICS = {"triviaqa": "exact_match", "cola": "matthews"} | dict.fromkeys(
    ("hellaswag", "arc_challenge", "piqa"), "accuracy_norm"
)
SCORINGS = {"mrpc": "f1", "qqp": "f1", "winogrande": "llm-adapters", "hellaswag": "plain"}


def written(folder: Path, name: str, **more: Any) -> NamedBenchmark:
    split, rows = ROWS[name]
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return NamedBenchmark(name=name, data=str(folder), max_length=120, **more)


@pytest.mark.parametrize("name", ROWS)
def test_rows_in_the_form_of_the_hub(pair: AdapterPair, tokenizer: Any, tmp_path: Path, name: str) -> None:
    result = score_named(pair, tokenizer, written(tmp_path, name))
    assert (result.n, result.metric) == (len(ROWS[name][1]), METRICS.get(name, "accuracy"))
    for item, row in zip(result.items, ROWS[name][1], strict=True):
        if name == "triviaqa":
            assert item["answers"] == row["answer"]["aliases"]
            assert item["prompt"] == "Question: Who ran?\nAnswer:"
            continue
        sums = np.array(item["loglikelihoods_after"])
        divided = np.array([len(choice) for choice in item["choices"]]) if result.metric == "accuracy_norm" else 1
        assert item["after"] == float(np.argmax(sums / divided) == item["label"])
        assert item["choices"][item["label"]] == item["answers"][0]
    if name == "winogrande":
        assert [item["label"] for item in result.items] == [0, 1]
        assert result.items[1]["choices"] == ["Lily gave sun", "Lily gave a ball"]
    if name == "hellaswag":
        assert result.items[0]["prompt"] == "Play: A dog. ran. Then it"


@pytest.mark.parametrize("name", ["cola", "mrpc", "qqp"])
def test_scores_of_the_whole_set(pair: AdapterPair, tokenizer: Any, tmp_path: Path, name: str) -> None:
    result = score_named(pair, tokenizer, written(tmp_path, name, scoring=SCORINGS.get(name, "standard")))
    truth = [item["label"] for item in result.items]
    for side, score in (("before", result.before), ("after", result.after)):
        said = [int(np.argmax(item[f"loglikelihoods_{side}"])) for item in result.items]
        right = metrics.matthews_corrcoef(truth, said) if name == "cola" else metrics.f1_score(truth, said)
        assert score == pytest.approx(right, abs=1e-12)
        assert [item[side] for item in result.items] == [float(a == b) for a, b in zip(truth, said, strict=True)]
    assert result.interval[0] <= result.after - result.before <= result.interval[1]


@pytest.mark.parametrize("name", ["winogrande", "hellaswag"])
def test_other_scorings(pair: AdapterPair, tokenizer: Any, tmp_path: Path, name: str) -> None:
    result = score_named(pair, tokenizer, written(tmp_path, name, scoring=SCORINGS[name]))
    assert result.metric == {"winogrande": "exact_match", "hellaswag": "accuracy"}[name]
    if name == "winogrande":
        assert result.items[1]["answers"] == ["option2"]
        assert "Option1: sun Option2: a ball Answer format: option1/option2" in result.items[1]["prompt"]


MATH = [
    {"problem": "What is $1+1$?", "solution": "It is $\\boxed{2}$.", "level": "1", "type": "Algebra"},
    {"problem": "What is $1/2$?", "solution": "It is $\\boxed{\\frac{1}{2}}$.", "level": "1", "type": "Algebra"},
]


@pytest.mark.parametrize(
    ("scoring", "texts", "before", "after"),
    [
        ("standard", ["Final Answer: The final answer is $2$. I hope it is correct.", "no"], 0.5, 1.0),
        ("verify", ["It is $\\boxed{2}$", "$3$"], 0.5, 1.0),
        ("metamath", ["The answer is: 2", "$2$"], 0.5, 1.0),
    ],
)
def test_math(
    pair: AdapterPair,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scoring: str,
    texts: list[str],
    before: float,
    after: float,
) -> None:
    from lm_eval.models.huggingface import HFLM

    if scoring != "metamath":
        pytest.importorskip("math_verify")
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in MATH), "utf-8")
    right = {
        "standard": "Final Answer: The final answer is $\\frac12$. I hope it is correct.",
        "verify": "so $\\boxed{1/2}$",
        "metamath": "The answer is: 0.5.",
    }[scoring]
    answers = iter([texts, [texts[0], right]])
    monkeypatch.setattr(HFLM, "generate_until", lambda self, requests, quiet: next(answers))
    benchmark = NamedBenchmark(name="math", data=str(tmp_path), scoring=scoring)
    result = score_named(pair, tokenizer, benchmark)
    assert (result.before, result.after) == (before, after)
    assert result.items[0]["prompt"].startswith("Problem:\nWhat is" if scoring != "metamath" else "Below is")
    assert len(result.items[0].get("shots", ())) == (0 if scoring == "metamath" else 4)
