"""The verdict says what the intervals support."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from keeptune.report.pages.verdict import method_sentences, verdict

Make = Callable[..., dict[str, Any]]


def test_clear_winner(make: Make) -> None:
    assert verdict(make(("lora", 0.73, 0.83), ("null", 0.96, 0.82))) == (
        "null lost the least of facts (4.0 points), clearly less than lora (27); on the task (tools) there "
        "is no clear difference between it (0.820) and the best, lora (0.830)."
    )


def test_tie_with_the_second(make: Make) -> None:
    text = verdict(make(("a", 0.95, 0.8), ("b", 0.93, 0.8), ("c", 0.5, 0.8)))
    assert "with no clear difference to b (7.0), and clearly less than c (50)" in text
    assert "it also has the best mean on the task" in text


def test_overlapping_intervals_name_no_winner(make: Make) -> None:
    text = verdict(make(("a", 0.95, 0.81), ("b", 0.93, 0.8)))
    assert text.startswith("No method is clearly ahead in keeping facts: no clear difference")
    assert "lost the least" not in text
    assert "no clear difference to a, the best (0.810)" in text


def test_task_winner_without_a_knowledge_winner(make: Make) -> None:
    assert "a (0.800) is clearly ahead of b" in verdict(make(("a", 0.95, 0.8), ("b", 0.94, 0.5)))


def test_keeper_that_learned_less(make: Make) -> None:
    text = verdict(make(("a", 0.96, 0.4), ("b", 0.7, 0.8)))
    assert "it is clearly behind b (0.400 against 0.800)" in text
    assert "did not clearly learn" not in text


def test_keeper_that_learned_nothing(make: Make) -> None:
    text = verdict(make(("idle", 1.0, 0.06), ("b", 0.7, 0.8)))
    assert "idle lost the least" in text
    assert "it did not clearly learn the task" in text


def test_single_method(minimal: dict[str, Any]) -> None:
    assert verdict(minimal) == "lora lost 30 points of facts (95% interval 20 to 40)."


def test_no_runs(minimal: dict[str, Any]) -> None:
    minimal["methods"] = []
    assert verdict(minimal) == "The report holds no runs."
    assert method_sentences(minimal) == []


@pytest.mark.parametrize(
    ("kept", "task", "words"),
    [
        (0.99, 0.8, "learned the task (tools 0.050 → 0.800) and showed no clear change on facts"),
        (0.99, 0.07, "did not clearly learn the task"),
        (0.99, 0.0, "got worse at the task"),
        (1.1, 0.8, "gained 10 points of facts (95% interval 7.0 to 13)"),
        (0.73, 0.8, "lost 27 points of facts (95% interval 24 to 30)"),
    ],
)
def test_sentences(make: Make, kept: float, task: float, words: str) -> None:
    report = make(("m", kept, task))
    if task == 0.0:
        report["methods"][0]["benchmarks"][-1]["interval"] = [-0.06, -0.04]
    assert words in method_sentences(report)[0]


def test_without_intervals_nothing_is_called_clear(make: Make) -> None:
    report = make(("a", 0.96, 0.8), ("b", 0.5, 0.4))
    for run in report["methods"]:
        for item in run["benchmarks"]:
            item["interval"] = None
    assert "clearly less" not in verdict(report)
    assert "no interval" in method_sentences(report)[0]


def test_cross_entropy_alone(make: Make) -> None:
    report = make(("a", 0.9, None), ("b", 0.5, None))
    for run in report["methods"]:
        run["benchmarks"] = run["benchmarks"][1:2]
    assert verdict(report) == "a lost the least of wiki (0.050 nats/token), clearly less than b (0.250)."


def test_cross_entropy_task_gets_better_downwards(make: Make) -> None:
    report = make(("a", 0.9, None), ("b", 0.5, None))
    for run, after in zip(report["methods"], (1.0, 1.5), strict=True):
        task = {"name": "chat", "role": "task", "metric": "cross_entropy", "n": 5, "before": 2.0}
        run["benchmarks"].append({**task, "after": after, "interval": [after - 2.1, after - 1.9]})
    assert "a learned the task (chat 2.000 → 1.000)" in method_sentences(report)[0]
    assert "it also has the best mean on the task (chat, 1.000)" in verdict(report)


def test_several_knowledge_accuracies_are_averaged(make: Make) -> None:
    report = make(("a", 0.9, None), ("b", 0.5, None))
    for run in report["methods"]:
        run["benchmarks"].append({**run["benchmarks"][0], "name": "mmlu"})
    assert "knowledge (mean of facts and mmlu)" in verdict(report)
    assert "lost 10 points of knowledge (95%" in method_sentences(report)[0]
