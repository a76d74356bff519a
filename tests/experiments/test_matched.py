"""Forgetting at matched task score, by hand and against a scan."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.experiments.support import point
from tests.reference.front_reference import forgotten_by_scan

from keeptune.core.errors import RecipeError
from keeptune.experiments.matched import At, default_score, forgotten_at, matched, reach

LINE = [(0.4, 0.0), (0.6, 0.1), (0.8, 0.5)]
PLACES = st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), min_size=1, max_size=8)


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        (0.6, At("exact", 0.1, (1,))),
        (0.7, At("interpolated", 0.1 + 0.5 * 0.4, (1, 2))),
        (0.3, At("above", 0.0, (0,))),
        (0.81, At("not reached", None)),
    ],
)
def test_each_way_by_hand(score: float, expected: At) -> None:
    found = forgotten_at(LINE, score)
    assert (found.how, found.used) == (expected.how, expected.used)
    assert found.forgotten == (None if expected.forgotten is None else pytest.approx(expected.forgotten))


def test_a_dominated_place_at_the_score_is_not_taken() -> None:
    found = forgotten_at([*LINE, (0.7, 0.9)], 0.7)
    assert (found.how, found.forgotten) == ("interpolated", pytest.approx(0.3))


def test_ties_are_all_named() -> None:
    assert forgotten_at([(0.5, 0.1), (0.5, 0.1)], 0.5) == At("exact", 0.1, (0, 1))


@given(PLACES, st.integers(-1, 18))
def test_the_value_is_that_of_a_scan(places: list[tuple[int, int]], twice: int) -> None:
    found = forgotten_at(places, twice / 2).forgotten
    expected = forgotten_by_scan(places, twice / 2)
    assert found == (None if expected is None else pytest.approx(expected))


@given(PLACES, st.integers(0, 16))
def test_a_worse_place_changes_nothing(places: list[tuple[int, int]], twice: int) -> None:
    worse = (places[0][0] - 1, places[0][1] + 1)
    assert forgotten_at([*places, worse], twice / 2) == forgotten_at(places, twice / 2)


def test_the_default_is_the_highest_score_that_more_than_half_reach() -> None:
    groups = {
        "a": [point("a", (0.9, 0.1), (0.7, 0.1))],  # 0.7 with every seed
        "b": [point("b", (0.8, 0.1), (0.8, 0.1)), point("b2", (0.2, 0.0), (0.3, 0.0))],  # 0.8
        "c": [point("c", (0.5, 0.1), (0.5, 0.1))],
    }
    assert [reach(points) for points in groups.values()] == [0.7, 0.8, 0.5]
    assert default_score(groups) == 0.7
    assert default_score({**groups, "d": [point("d", (0.4, 0.0))]}) == 0.5


def test_seeds_are_read_off_one_by_one_and_set_against_the_baseline() -> None:
    groups = {
        "lora": [point("slow", (0.5, 0.1), (0.4, 0.1)), point("fast", (0.7, 0.3), (0.8, 0.5))],
        "keep": [point("k", (0.6, 0.05), (0.6, 0.15), label="keep")],
        "weak": [point("w", (0.6, 0.0), (0.5, 0.0), label="weak")],
    }
    table = matched(groups, 0.6, "lora")
    rows = {row["label"]: row for row in table["rows"]}
    assert [row["label"] for row in table["rows"]] == ["keep", "lora", "weak"]
    assert rows["lora"]["how"] == "interpolated"
    assert rows["lora"]["values"] == {"0": pytest.approx(0.2), "1": pytest.approx(0.3)}
    assert rows["lora"]["points"] == ["slow", "fast"]
    assert rows["lora"]["difference"] is None
    assert rows["keep"]["how"] == "exact"
    assert rows["keep"]["forgotten"]["mean"] == pytest.approx(0.1)
    # pairs: 0.05 - 0.2 and 0.15 - 0.3
    assert rows["keep"]["difference"]["mean"] == pytest.approx(-0.15)
    assert rows["keep"]["difference"]["sd"] == pytest.approx(0.0, abs=1e-9)
    assert rows["keep"]["difference"]["seeds"] == [0, 1]
    weak = rows["weak"]
    assert (weak["how"], weak["forgotten"], weak["not_reached"], weak["difference"]) == ("not reached", None, [1], None)
    assert weak["values"] == {"0": 0.0}


def test_a_seed_that_only_learned_more_makes_the_row_a_bound() -> None:
    table = matched({"lora": [point("a", (0.6, 0.1), (0.7, 0.3))]}, 0.6, None)
    assert (table["rows"][0]["how"], table["rows"][0]["forgotten"]["mean"]) == ("above", pytest.approx(0.2))


def test_without_a_common_seed_the_means_are_read_off() -> None:
    groups = {"lora": [point("a", (0.5, 0.1), seeds=(0,)), point("b", (0.7, 0.3), seeds=(1,))]}
    row = matched(groups, 0.6, "lora")["rows"][0]
    assert (row["forgotten"]["mean"], row["forgotten"]["low"], row["seeds"]) == (pytest.approx(0.2), None, [])
    assert (row["values"], row["not_reached"]) == ({}, [])


def test_one_seed_gives_no_interval() -> None:
    row = matched({"lora": [point("a", (0.6, 0.1))]}, None, None)["rows"][0]
    assert (row["how"], row["forgotten"]) == ("exact", {"mean": 0.1, "low": None, "high": None, "sd": None})


def test_paired_interval_by_hand() -> None:
    groups = {
        "lora": [point("a", (1, 0.2), (1, 0.4), (1, 0.6))],
        "keep": [point("b", (1, 0.1), (1, 0.2), (1, 0.6))],
    }
    difference = matched(groups, 1, "lora")["rows"][0]["difference"]
    assert difference["mean"] == pytest.approx(-0.1)
    assert difference["high"] == pytest.approx(-0.1 + 4.302653 * 0.1 / math.sqrt(3))


def test_a_baseline_that_is_no_label_is_refused() -> None:
    with pytest.raises(RecipeError, match='Did you mean "lora"'):
        matched({"lora": [point("a", (0.6, 0.1))]}, None, "lorra")


def test_nothing_gives_an_empty_table() -> None:
    assert matched({}, None, None) == {"score": None, "baseline": None, "rows": []}
