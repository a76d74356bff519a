"""What a run learned and forgot, by hand."""

from __future__ import annotations

import math

import pytest
from tests.experiments.support import benchmark

from keeptune.core.errors import RecipeError
from keeptune.experiments.axes import (
    Axis,
    Value,
    axes_of,
    loss_of,
    unit_of,
    value_of,
)

SHARES = [
    benchmark("words", "task", 0.1, 0.5),
    benchmark("sums", "task", 0.2, 0.9),
    benchmark("facts", "knowledge", 0.8, 0.7),
    benchmark("places", "knowledge", 0.5, 0.1),
]
LOSSES = [
    benchmark("task loss", "task", 3.0, 1.5, "cross_entropy"),
    benchmark("text loss", "knowledge", 2.0, 2.25, "cross_entropy"),
]


def test_learned_is_the_mean_after_and_forgotten_the_mean_drop() -> None:
    axes = axes_of(SHARES)
    assert value_of(SHARES, axes["learned"]) == Value(0.7, "", (0.0, 0.25))  # (0.5 + 0.9) / 2
    assert value_of(SHARES, axes["forgotten"]) == Value(0.25, "", (-0.1, 0.15))  # (0.1 + 0.4) / 2
    assert value_of([SHARES[0] | {"interval": None}, SHARES[1]], axes["learned"]) == Value(0.7), "of all or none"


def test_nats_change_sign_so_that_more_learned_is_better() -> None:
    axes = axes_of(LOSSES)
    assert (axes["learned"].unit, axes["forgotten"].unit) == ("nats", "nats")
    assert value_of(LOSSES, axes["learned"]).number == -1.5
    assert value_of(LOSSES, axes["forgotten"]).number == 0.25


def test_shares_come_before_nats_and_the_two_are_never_mixed() -> None:
    axes = axes_of(SHARES + LOSSES)
    assert axes["learned"] == Axis("task", ("words", "sums"), "share")
    mixed = axes_of(SHARES[:2] + LOSSES[1:])
    assert (mixed["learned"].unit, mixed["forgotten"].unit) == ("share", "nats")


def test_named_benchmarks_are_taken_in_place_of_all() -> None:
    axes = axes_of(SHARES + LOSSES, ["sums"], ["text loss"])
    assert value_of(SHARES + LOSSES, axes["learned"]).number == 0.9
    assert value_of(SHARES + LOSSES, axes["forgotten"]).number == 0.25


@pytest.mark.parametrize(
    ("learned", "part"),
    [(["sum"], 'Did you mean "sums"'), (["facts"], "task benchmarks"), ([], "empty"), (["sums", "task loss"], "unit")],
)
def test_names_that_do_not_fit_are_refused(learned: list[str], part: str) -> None:
    with pytest.raises(RecipeError, match=part):
        axes_of(SHARES + LOSSES, learned)


@pytest.mark.parametrize("role", ["task", "knowledge"])
def test_a_comparison_needs_both_roles(role: str) -> None:
    with pytest.raises(RecipeError, match=f"role: {role}"):
        axes_of([b for b in SHARES if b["role"] != role])


@pytest.mark.parametrize("score", [None, math.nan, math.inf])
def test_a_score_that_is_none_leaves_no_mean_over_the_others(score: float | None) -> None:
    axes = axes_of(SHARES)
    broken = [*SHARES[:2], benchmark("facts", "knowledge", 0.8, score), SHARES[3]]
    assert value_of(broken, axes["forgotten"]) == Value(None, "the score of facts after training is missing")
    assert value_of(broken, axes["learned"]).number == 0.7
    before = [*SHARES[:3], benchmark("places", "knowledge", score, 0.1)]
    assert value_of(before, axes["forgotten"]).why == "the score of places before training is missing"


def test_a_benchmark_that_is_not_there_is_said() -> None:
    axes = axes_of(SHARES)
    assert value_of(SHARES[1:], axes["learned"]) == Value(None, "no score of words")


def test_equal_drops_are_equal_numbers() -> None:
    assert 0.8 - 0.7 != 0.5 - 0.4
    assert loss_of(0.8, 0.7, "share") == loss_of(0.5, 0.4, "share") == 0.1
    assert loss_of(2.0, 2.5, "nats") == 0.5


def test_only_cross_entropies_are_nats() -> None:
    assert [unit_of(m) for m in ("cross_entropy", "exact_match", "matthews")] == ["nats", "share", "share"]
