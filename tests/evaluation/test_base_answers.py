"""The base's answers are asked for once, and a result made with kept ones is the one made without."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tests.models import counted_passes
from tests.pipeline.support import write_jsonl

from keeptune.evaluation import AdapterPair, FileBenchmark, evaluate
from keeptune.evaluation.model_pairs import KeptAnswers

# PEFT 0.21 asks transformers 5.23 for a property under its old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

EXACT = FileBenchmark(
    name="exact",
    role="knowledge",
    file="rows.jsonl",
    metric="exact_match",
    prompt="{question}",
    answer="{answer}",
    max_new_tokens=4,
)
CHOICES = FileBenchmark(
    name="choices",
    role="knowledge",
    file="rows.jsonl",
    metric="multiple_choice",
    prompt="{question}",
    choices="{choices}",
    answer="{label}",
)
ROWS = [
    {"question": "Once upon a", "answer": " time", "choices": ["time", "car"], "label": 0},
    {"question": "Tom and", "answer": " Lily", "choices": ["his mom", "blue"], "label": 1},
]


@pytest.fixture
def asked(stories: Any, tokenizer: Any, tmp_path: Path) -> Callable[..., tuple[Any, int]]:
    """Score a benchmark with a random adapter; give the result and the number of forward passes."""
    write_jsonl(tmp_path / "rows.jsonl", ROWS)
    torch.manual_seed(2)
    pair = AdapterPair(get_peft_model(stories, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)))

    def score(benchmark: FileBenchmark, kept: KeptAnswers | None) -> tuple[Any, int]:
        with counted_passes(stories) as count:
            result = evaluate(pair, tokenizer, benchmark, tmp_path, kept=kept)
        return result, count[0]

    return score


@pytest.mark.parametrize("benchmark", [EXACT, CHOICES], ids=lambda b: b.name)
def test_a_result_with_kept_answers_is_the_one_without(
    asked: Callable[..., tuple[Any, int]], benchmark: FileBenchmark, tmp_path: Path
) -> None:
    kept = KeptAnswers(tmp_path / "base", "this base")
    alone, passes = asked(benchmark, None)
    first, same = asked(benchmark, kept)
    again, fewer = asked(benchmark, kept)
    assert alone == first == again
    assert passes == same == 2 * fewer


def test_answers_to_another_question_or_of_another_base_are_not_taken(
    asked: Callable[..., tuple[Any, int]], tmp_path: Path
) -> None:
    kept = KeptAnswers(tmp_path / "base", "this base")
    _, passes = asked(EXACT, kept)
    changes = [
        (replace(EXACT, max_new_tokens=3), kept),
        (replace(EXACT, prompt="{question} a"), kept),
        (EXACT, KeptAnswers(kept.folder, "another base")),
    ]
    for benchmark, where in changes:
        found, some = asked(benchmark, where)
        assert found == asked(benchmark, None)[0]
        assert some > passes / 2
    rows = (tmp_path / "rows.jsonl").read_text(encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text(rows.replace("Tom and", "Lily and"), encoding="utf-8")
    assert asked(EXACT, kept)[0] == asked(EXACT, None)[0]


@pytest.mark.parametrize("damage", ["cut", "changed", "other shape"])
def test_a_damaged_file_is_not_used(
    asked: Callable[..., tuple[Any, int]], damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = KeptAnswers(tmp_path / "base", "this base")
    wanted, passes = asked(EXACT, kept)
    (path,) = kept.folder.glob("*.json")
    record = json.loads(path.read_text(encoding="utf-8"))
    record["answers"][0] += "!"
    broken = {"cut": "{", "changed": json.dumps(record), "other shape": "[1]"}[damage]
    path.write_text(broken, encoding="utf-8")
    with caplog.at_level(logging.WARNING, logger="keeptune"):
        assert asked(EXACT, kept) == (wanted, passes)
    assert "damaged" in caplog.text
    assert asked(EXACT, kept) == (wanted, passes // 2)
