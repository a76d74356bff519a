from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from keeptune.core.errors import ArtefactError, StatisticsError
from keeptune.evaluation.results import BenchmarkResult, grouped, mean_scores, trade_off

RESULT = BenchmarkResult(
    name="facts",
    role="knowledge",
    metric="exact_match",
    n=2,
    before=0.5,
    after=0.25,
    interval=(-0.5, 0.0),
    kl_to_base=None,
    groups={"capital": {"n": 1, "before": 1.0, "after": 0.5}},
    items=[
        {"index": 0, "group": "capital", "before": 1.0, "after": 0.5, "text_after": "a\u2028b\né"},
        {"index": 1, "group": None, "before": 0.0, "after": 0.0},
    ],
)


def task(name: str, after: float, **extra: Any) -> BenchmarkResult:
    return replace(RESULT, name=name, role="task", after=after, **extra)


def test_the_summary_is_json_without_the_items() -> None:
    summary = RESULT.summary()
    assert json.loads(json.dumps(summary)) == summary
    assert list(summary) == [
        "name", "role", "metric", "n", "before", "after", "interval", "kl_to_base", "groups", "chat",
    ]  # fmt: skip
    assert summary["interval"] == [-0.5, 0.0]


def test_items_survive_the_round_trip() -> None:
    text = RESULT.to_jsonl()
    assert text.count("\n") == RESULT.n
    assert BenchmarkResult.from_jsonl(RESULT.summary(), text) == RESULT


def test_damaged_files_are_named() -> None:
    text = RESULT.to_jsonl()
    with pytest.raises(ArtefactError, match="1 items of facts, not 2"):
        BenchmarkResult.from_jsonl(RESULT.summary(), text.split("\n")[0])
    with pytest.raises(ArtefactError, match="JSONDecodeError"):
        BenchmarkResult.from_jsonl(RESULT.summary(), text[:-4])
    with pytest.raises(ArtefactError, match="interval"):
        BenchmarkResult.from_jsonl({k: v for k, v in RESULT.summary().items() if k != "interval"}, text)


def test_trade_off() -> None:
    results = [RESULT, task("math", 0.4), task("code", 0.3)]
    full = [task("code", 0.3), task("math", 0.8), RESULT]
    assert trade_off(results, full) == {"K": 0.5, "average_forgetting": 0.5, "T": 0.75, "KT": 2 * 0.5 * 0.75 / 1.25}
    assert trade_off(results) == {"K": 0.5, "average_forgetting": 0.5, "T": None, "KT": None}
    assert trade_off([]) == {"K": None, "average_forgetting": None, "T": None, "KT": None}


def test_full_fine_tuning_must_have_the_same_benchmarks() -> None:
    with pytest.raises(StatisticsError, match="benchmark math"):
        trade_off([task("math", 0.4)], [task("math", 0.4, n=3)])


def test_groups_and_rates() -> None:
    found = grouped(["a", None, "b", "a"], [1.0, 9.0, 4.0, 3.0], [0.0, 9.0, 2.0, 1.0], [1.0, 1.0, 8.0, 3.0])
    assert found == {
        "a": {"n": 2, "before": 1.0, "after": 0.25},
        "b": {"n": 1, "before": 0.5, "after": 0.25},
    }
    records = [
        {"group": None, "before": 0.5, "after": 1.0, "kl": 0.25},
        {"group": "a", "before": 0.5, "after": 0.25, "kl": 1.0},
    ]
    means = mean_scores(records, [2.0, 6.0], 0)
    assert (means["before"], means["after"], means["kl_to_base"]) == (0.5, 3.5 / 8, 6.5 / 8)
    assert means["groups"] == {"a": {"n": 1, "before": 0.5, "after": 0.25}}
