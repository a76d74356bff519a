"""Points and fronts against slow versions, and their laws."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.experiments.support import row
from tests.reference.front_reference import pareto_brute

from keeptune.experiments.front import (
    as_json,
    families,
    pareto,
    points_of,
    spread,
)

WHOLE = st.lists(st.tuples(st.integers(0, 8), st.integers(-3, 8)), min_size=1, max_size=10)
ANY = st.floats(-2, 2, allow_subnormal=False)
PLACES = st.lists(st.tuples(ANY, ANY), min_size=1, max_size=7)


def test_spread_by_hand() -> None:
    over = spread([0.1, 0.2, 0.6])
    assert over.mean == 0.3
    assert over.sd == pytest.approx(math.sqrt((0.04 + 0.01 + 0.09) / 2))
    # t(0.975, 2 degrees of freedom) is 4.302653 in every table
    half = 4.302653 * over.sd / math.sqrt(3)
    assert (over.low, over.high) == pytest.approx((0.3 - half, 0.3 + half))


def test_one_seed_has_no_spread_over_seeds_and_equal_seeds_have_none_to_show() -> None:
    assert as_json(spread([0.4])) == {"mean": 0.4, "low": None, "high": None, "sd": None}
    assert as_json(spread([0.4, 0.4, 0.4])) == {"mean": 0.4, "low": 0.4, "high": 0.4, "sd": 0.0}


def test_points_have_the_interval_that_every_page_has() -> None:
    rows = [
        row(seed=s, learned=0.6, forgotten=0.1 * s, forgotten_interval=(0.1 * s - 0.3, 0.1 * s + 0.2)) for s in (0, 1)
    ]
    one, both = points_of(rows[:1])[0][0], points_of(rows)[0][0]
    assert as_json(one.over_seeds("forgotten")) == {"mean": 0.0, "low": -0.3, "high": 0.2, "sd": None}
    assert (one.over_seeds("learned").has_interval, both.over_seeds("learned").low) == (False, 0.6)
    forgotten = both.over_seeds("forgotten")
    half = 12.706205 * 0.1 / 2  # wider than the items' [-0.25, 0.25]
    assert (forgotten.low, forgotten.high) == pytest.approx((0.05 - half, 0.05 + half))


def test_a_front_by_hand() -> None:
    #         best   worse on both  tie   tie   learns most
    places = [(0.5, 0.1), (0.4, 0.2), (0.6, 0.3), (0.6, 0.3), (0.9, 0.5), (0.9, 0.6)]
    assert pareto(places) == [True, False, True, True, True, False]
    assert pareto([(0.1, 5.0)]) == [True]
    assert pareto([]) == []


@given(WHOLE)
def test_the_front_is_what_nothing_dominates(places: list[tuple[int, int]]) -> None:
    assert pareto(places) == pareto_brute(places)


@given(WHOLE, st.randoms())
def test_the_order_of_places_does_not_matter(places: list[tuple[int, int]], random: object) -> None:
    shuffled = sorted(places, key=lambda _: random.random())  # type: ignore[attr-defined]
    on = dict(zip(places, pareto(places), strict=True))
    assert dict(zip(shuffled, pareto(shuffled), strict=True)) == on


@given(PLACES, st.integers(0, 6), st.floats(0, 1), st.floats(0, 1))
def test_a_dominated_place_changes_nothing(places: list, at: int, less: float, more: float) -> None:  # type: ignore[type-arg]
    learned, forgotten = places[at % len(places)]
    worse = (learned - less - 0.01, forgotten + more + 0.01)
    assert pareto([*places, worse]) == [*pareto(places), False]


def test_seeds_are_gathered_into_points() -> None:
    rows = [row(seed=s, learned=0.5 + 0.1 * s, forgotten=0.1 * s) for s in (2, 0, 1)]
    rows += [row(rate=2e-3, seed=0), row("keep", seed=0, strength=3.0), row("keep", seed=0, strength=1.0)]
    points, excluded = points_of(rows)
    assert [p.name for p in points] == ["lora-lr0.001", "lora-lr0.002", "keep-lr0.001", "keep-lr0.001 (2)"]
    assert points[0].places == {0: (0.5, 0.0), 1: (0.6, 0.1), 2: (0.7, 0.2)}
    assert points[0].place == (0.6, 0.1)
    assert points[0].rows[2]["name"] == "lora-lr0.001-seed2"
    assert excluded == []


def test_what_is_in_no_point_is_said() -> None:
    rows = [
        row(seed=0),
        row(seed=0, name="again"),
        row(seed=1, status="failed", message="out of memory", learned=None),
        row(seed=2, status="missing", message=""),
        row(seed=3, learned=None, why="the score of facts after training is NaN"),
        row(seed=4, forgotten=math.nan),
    ]
    points, excluded = points_of(rows)
    assert list(points[0].places) == [0]
    assert {entry["run"]: entry["why"] for entry in excluded} == {
        "again": "the same setting and seed as lora-lr0.001-seed0",
        "lora-lr0.001-seed1": "failed: out of memory",
        "lora-lr0.001-seed2": "missing: no message",
        "lora-lr0.001-seed3": "the score of facts after training is NaN",
        "lora-lr0.001-seed4": "forgotten is not a finite number",
    }


def test_the_family_of_a_variant_has_the_untouched_points_too() -> None:
    variant = {"variant": {"scale": 0.5}, "label": "lora, scaled", "of": "lora"}
    rows = [row(), row("keep"), row(**{**variant, "name": "lora-lr0.001-seed0/scale-0.5"})]
    points, _ = points_of(rows)
    groups = families(points)
    assert {label: [p.name for p in members] for label, members in groups.items()} == {
        "lora": ["lora-lr0.001"],
        "keep": ["keep-lr0.001"],
        "lora, scaled": ["lora-lr0.001/scale-0.5", "lora-lr0.001"],
    }
