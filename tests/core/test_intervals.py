"""The rule for intervals: the hull of Student's over seeds and the averaged item intervals."""

from __future__ import annotations

import math

import pytest

from keeptune.core.intervals import Estimate, clearly_above, combine, lower_is_better, mean_of_seeds, t_half_width


def test_t_interval_of_two_and_three_values() -> None:
    assert t_half_width([0.0, 2.0]) == pytest.approx(12.7062, rel=1e-4)
    assert t_half_width([1.0, 2.0, 3.0]) == pytest.approx(4.30265 / math.sqrt(3), rel=1e-4)
    assert math.isnan(t_half_width([1.0]))


def test_one_seed_has_the_interval_of_its_items() -> None:
    assert combine([(1.0, 0.5, 1.5)]) == Estimate(1.0, 0.5, 1.5, (1.0,))


def test_identical_seeds_keep_the_interval_of_the_items() -> None:
    estimate = combine([(1.0, 0.5, 1.5), (1.0, 0.5, 1.5)])
    assert estimate is not None
    assert (estimate.low, estimate.high) == (0.5, 1.5)


def test_scattered_seeds_widen_the_interval() -> None:
    estimate = combine([(0.0, -0.1, 0.1), (2.0, 1.9, 2.1)])
    assert estimate is not None
    assert estimate.low < -11


def test_without_item_intervals_the_seeds_alone_count() -> None:
    estimate = mean_of_seeds([1.0, 2.0, 3.0])
    assert estimate is not None
    assert estimate.sd == 1.0
    assert (estimate.low, estimate.high) == (2 - t_half_width([1, 2, 3]), 2 + t_half_width([1, 2, 3]))


def test_without_a_value_there_is_no_estimate_and_with_one_no_interval() -> None:
    assert combine([]) is None and mean_of_seeds([math.nan]) is None
    single = mean_of_seeds([2.0])
    assert single is not None and not single.has_interval and math.isnan(single.sd)


def test_above_means_that_the_intervals_do_not_overlap() -> None:
    low, high, wide = (combine([triple]) for triple in ((0.0, -1.0, 1.0), (3.0, 2.0, 4.0), (2.0, 0.5, 3.5)))
    assert low is not None and high is not None and wide is not None
    assert clearly_above(high, low) and not clearly_above(low, high) and not clearly_above(wide, low)
    bare = mean_of_seeds([9.0])
    assert bare is not None and not clearly_above(bare, low)


def test_only_cross_entropies_are_better_when_lower() -> None:
    assert lower_is_better("cross_entropy") and not lower_is_better("exact_match")
