"""Accuracy, transfer and forgetting equal hand computation, and keep their laws."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from keeptune.experiments.sequence.sequence_record import measures
from keeptune.experiments.sequence.transfer_metrics import transfer_of

MEASURES = ("average_accuracy", "backward_transfer", "forward_transfer", "forgetting")
# Rows: after stage 1, 2, 3. The first task is best after stage 2, the second one straight after its own.
R = [[0.8, 0.3, 0.0], [0.9, 0.7, 0.2], [0.5, 0.4, 0.6]]
BASE = [0.1, 0.1, 0.05]


def found(matrix: list[list[float]], base: list[float] | None = None) -> list[Any]:
    """The four measures."""
    measured = transfer_of(matrix, base or [0.0] * len(matrix))
    return [measured[name] for name in MEASURES]


def test_by_hand() -> None:
    accuracy = (0.5 + 0.4 + 0.6) / 3
    backward, forward = ((0.5 - 0.8) + (0.4 - 0.7)) / 2, ((0.3 - 0.1) + (0.2 - 0.05)) / 2
    assert found(R, BASE) == pytest.approx([accuracy, backward, forward, (0.4 + 0.3) / 2])
    assert transfer_of(R, BASE)["forgetting_of_each"] == pytest.approx([0.9 - 0.5, 0.7 - 0.4])


def test_the_best_score_may_be_from_before_a_tasks_own_stage() -> None:
    measured = transfer_of([[0.2, 0.9, 0], [0.2, 0.5, 0], [0.2, 0.5, 1]], BASE)
    assert measured["forgetting_of_each"] == pytest.approx([0.0, 0.4])


def test_the_last_row_is_not_its_own_best() -> None:
    # A task that is better at the end than ever before has negative forgetting (Chaudhry et al.: k - 1, not k).
    assert found([[0.5, 0.0], [0.8, 0.9]])[3] == pytest.approx(-0.3)


def test_one_stage_has_no_transfer_and_no_forgetting() -> None:
    assert found([[0.4]]) == [0.4, None, None, None]


def test_what_is_not_a_number_is_not_averaged_away() -> None:
    assert found([[0.8, 0.3], [math.nan, 0.7]], BASE[:2]) == [None, None, pytest.approx(0.2), None]
    # max() drops a NaN, depending on the order.
    assert found([[math.nan, 0, 0], [0.5, 0.5, 0], [0.1, 0.1, 0.1]])[3] is None
    assert found([[0.5, 0, 0], [math.nan, 0.5, 0], [0.1, 0.1, 0.1]])[3] is None


@pytest.mark.parametrize("seed", range(5))
def test_laws(seed: int) -> None:
    draws = random.Random(seed)
    T = draws.randint(2, 5)
    matrix = [[draws.random() for _ in range(T)] for _ in range(T)]
    base = [draws.random() for _ in range(T)]
    accuracy, back, _, lost = found(matrix)
    assert min(matrix[-1]) <= accuracy <= max(matrix[-1])
    assert lost >= -back - 1e-12
    assert found([base] * T, base)[1:] == [0, 0, 0]


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
    told = measures(["one", "two"], benchmarks, scores)
    assert told["average_accuracy"] == pytest.approx((0.5 + 0.9) / 2)
    assert told["backward_transfer"] == pytest.approx(0.5 - 0.7)
    assert told["forward_transfer"] == pytest.approx(0.1 - 0.0)
    assert told["forgetting"] == pytest.approx(0.2)
    assert told["forgetting_of_each"] == {"one": pytest.approx(0.2)}
    assert told["course"] == [
        {"average_accuracy": pytest.approx(0.7), "forgetting": None},
        {"average_accuracy": pytest.approx(0.7), "forgetting": pytest.approx(0.2)},
    ]
    assert told["why"] == ""


def test_measures_say_why_there_are_none() -> None:
    benchmarks = [benchmark("a", "one"), benchmark("b", "two", "cross_entropy")]
    told = measures(["one", "two"], benchmarks, [[0.0, 1.0]] * 3)
    assert told["average_accuracy"] is None
    assert "stage two" in told["why"]
    broken = measures(["one"], [benchmark("a", "one")], [[0.0], [None]])
    assert broken["average_accuracy"] is None


def test_measures_of_a_score_that_is_not_a_number_say_so() -> None:
    benchmarks = [benchmark("a", "one"), benchmark("b", "two")]
    told = measures(["one", "two"], benchmarks, [[0.0, 0.0], [0.5, 0.0], [None, 0.5]])
    assert (told["average_accuracy"], told["forward_transfer"]) == (None, 0.0)
    assert told["why"] == "a score is not a number"
    assert told["forgetting_of_each"] == {"one": None}
