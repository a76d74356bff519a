"""Accuracy, transfer and forgetting equal hand computation, and keep their laws."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from keeptune.experiments.sequence.sequence_record import measures
from keeptune.experiments.sequence.transfer_metrics import (
    average_accuracy,
    backward_transfer,
    forgetting,
    forgetting_of_each,
    forward_transfer,
)

# Rows: after stage 1, 2, 3. The first task is best after stage 2, the second one straight after its own.
R = [[0.8, 0.3, 0.0], [0.9, 0.7, 0.2], [0.5, 0.4, 0.6]]
BASE = [0.1, 0.1, 0.05]


def test_by_hand() -> None:
    assert average_accuracy(R) == pytest.approx((0.5 + 0.4 + 0.6) / 3)
    assert backward_transfer(R) == pytest.approx(((0.5 - 0.8) + (0.4 - 0.7)) / 2)
    assert forward_transfer(R, BASE) == pytest.approx(((0.3 - 0.1) + (0.2 - 0.05)) / 2)
    assert forgetting_of_each(R) == pytest.approx([0.9 - 0.5, 0.7 - 0.4])
    assert forgetting(R) == pytest.approx((0.4 + 0.3) / 2)


def test_the_best_score_may_be_from_before_a_tasks_own_stage() -> None:
    assert forgetting_of_each([[0.2, 0.9, 0], [0.2, 0.5, 0], [0.2, 0.5, 1]]) == pytest.approx([0.0, 0.4])


def test_the_last_row_is_not_its_own_best() -> None:
    # A task that is better at the end than ever before has negative forgetting (Chaudhry et al.: k - 1, not k).
    assert forgetting([[0.5, 0.0], [0.8, 0.9]]) == pytest.approx(-0.3)


def test_one_stage_has_no_transfer_and_no_forgetting() -> None:
    assert average_accuracy([[0.4]]) == 0.4
    assert backward_transfer([[0.4]]) is None
    assert forward_transfer([[0.4]], [0.1]) is None
    assert forgetting([[0.4]]) is None
    assert average_accuracy([]) is None


def test_what_is_not_a_number_is_not_averaged_away() -> None:
    damaged = [[0.8, 0.3], [math.nan, 0.7]]
    assert [average_accuracy(damaged), backward_transfer(damaged), forgetting(damaged)] == [None] * 3
    assert forward_transfer(damaged, BASE[:2]) == pytest.approx(0.2)
    # max() drops a NaN, depending on the order.
    assert forgetting([[math.nan, 0, 0], [0.5, 0.5, 0], [0.1, 0.1, 0.1]]) is None
    assert forgetting([[0.5, 0, 0], [math.nan, 0.5, 0], [0.1, 0.1, 0.1]]) is None


@pytest.mark.parametrize("seed", range(5))
def test_laws(seed: int) -> None:
    draws = random.Random(seed)
    T = draws.randint(2, 5)
    matrix = [[draws.random() for _ in range(T)] for _ in range(T)]
    base = [draws.random() for _ in range(T)]
    found, back, lost = average_accuracy(matrix), backward_transfer(matrix), forgetting(matrix)
    assert found is not None and back is not None and lost is not None
    assert min(matrix[-1]) <= found <= max(matrix[-1])
    assert lost >= -back - 1e-12
    still = [base] * T
    assert backward_transfer(still) == forward_transfer(still, base) == forgetting(still) == 0


def benchmark(name: str, stage: str | None, metric: str = "exact_match") -> dict[str, Any]:
    return {"name": name, "role": "task" if stage else "knowledge", "metric": metric, "stage": stage}


def test_measures_leave_knowledge_aside_and_average_the_benchmarks_of_a_task() -> None:
    benchmarks = [
        benchmark("facts", None),
        benchmark("b", "two"),
        benchmark("a1", "one"),
        benchmark("a2", "one"),
        benchmark("a3", "one", "cross_entropy"),
    ]
    scores = [[1.0, 0.0, 0.0, 0.2, 9.0], [0.5, 0.1, 0.6, 0.8, 1.0], [0.2, 0.9, 0.4, 0.6, 3.0]]
    found = measures(["one", "two"], benchmarks, scores)
    assert found["average_accuracy"] == pytest.approx((0.5 + 0.9) / 2)
    assert found["backward_transfer"] == pytest.approx(0.5 - 0.7)
    assert found["forward_transfer"] == pytest.approx(0.1 - 0.0)
    assert found["forgetting"] == pytest.approx(0.2)
    assert found["forgetting_of_each"] == {"one": pytest.approx(0.2)}
    assert found["course"] == [
        {"average_accuracy": pytest.approx(0.7), "forgetting": None},
        {"average_accuracy": pytest.approx(0.7), "forgetting": pytest.approx(0.2)},
    ]
    assert found["why"] == ""


def test_measures_say_why_there_are_none() -> None:
    benchmarks = [benchmark("a", "one"), benchmark("b", "two", "cross_entropy")]
    found = measures(["one", "two"], benchmarks, [[0.0, 1.0]] * 3)
    assert found["average_accuracy"] is None
    assert "stage two" in found["why"]
    broken = measures(["one"], [benchmark("a", "one")], [[0.0], [None]])
    assert broken["average_accuracy"] is None


def test_measures_of_a_score_that_is_not_a_number_say_so() -> None:
    benchmarks = [benchmark("a", "one"), benchmark("b", "two")]
    found = measures(["one", "two"], benchmarks, [[0.0, 0.0], [0.5, 0.0], [None, 0.5]])
    assert (found["average_accuracy"], found["forward_transfer"]) == (None, 0.0)
    assert found["why"] == "a score is not a number"
    assert found["forgetting_of_each"] == {"one": None}
