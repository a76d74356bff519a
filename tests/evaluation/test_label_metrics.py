"""Scores of whole sets: the fast forms against the libraries, and the interval of their change."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from keeptune.core.bootstrap import paired_interval
from keeptune.evaluation.metrics import (
    LABELS,
    SCORES,
    Metric,
    agreement,
    agreement_interval,
    resampled,
)

CASES: list[tuple[Metric, int]] = [("accuracy", 3), ("f1", 2), ("f1", 4), ("matthews", 2), ("matthews", 5)]


def drawn(metric: Metric, labels: int, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    if metric in SCORES:
        return rng.integers(0, 4, n).astype(float), rng.normal(size=n).round(1)  # with ties
    truth = rng.integers(0, labels, n)
    return truth, np.where(rng.random(n) < 0.5, truth, rng.integers(0, labels, n))


def library(metric: Metric, truth: np.ndarray, said: np.ndarray, labels: int) -> float:
    """What scikit-learn and scipy say."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a single label
        if metric == "accuracy":
            return float(metrics.accuracy_score(truth, said))
        if metric == "matthews":
            return float(metrics.matthews_corrcoef(truth, said))
        if metric == "f1":
            average = "binary" if labels == 2 else "macro"
            return float(metrics.f1_score(truth, said, average=average, zero_division=0))
    return agreement(metric, truth, said)  # scipy's, and 0 of a constant


@pytest.mark.parametrize(("metric", "labels"), [*CASES, ("pearson", 0), ("spearman", 0)])
@pytest.mark.parametrize("n", [1, 2, 6, 40])
def test_the_form_for_many_sets_equals_the_library_on_each(metric: Metric, labels: int, n: int) -> None:
    sets = [drawn(metric, labels, n, seed) for seed in range(60)]
    truth, said = (np.stack(part) for part in zip(*sets, strict=True))
    found = resampled(metric, labels)(truth, said)
    assert found.shape == (60,)
    wanted = [library(metric, *one, labels) for one in sets] if n > 1 or metric in LABELS else [0.0] * 60
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-9)


def test_the_scores_are_those_of_plain_counting() -> None:
    truth, said = np.array([0, 0, 1, 1, 1, 0, 1, 0]), np.array([0, 1, 1, 1, 0, 0, 1, 1])
    tp, tn, fp, fn = 3, 2, 2, 1
    assert agreement("accuracy", truth, said, 2) == 5 / 8
    assert agreement("f1", truth, said, 2) == pytest.approx(2 * tp / (2 * tp + fp + fn))
    wanted = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert agreement("matthews", truth, said, 2) == pytest.approx(wanted)
    x, y = np.array([1.0, 2.0, 3.0, 5.0]), np.array([2.0, 1.0, 4.0, 30.0])
    dx, dy = x - x.mean(), y - y.mean()
    assert agreement("pearson", x, y) == pytest.approx((dx * dy).sum() / math.sqrt((dx**2).sum() * (dy**2).sum()))
    assert agreement("spearman", x, y) == pytest.approx(1 - 6 * 2 / (4 * 15))  # two ranks differ by one


def test_f1_is_that_of_the_second_label_of_two_and_the_mean_over_more() -> None:
    truth, said = np.array([0, 0, 0, 1, 1]), np.array([0, 0, 1, 1, 0])
    assert agreement("f1", truth, said, 2) == pytest.approx(metrics.f1_score(truth, said, pos_label=1))
    assert agreement("f1", truth, said, 3) == pytest.approx(metrics.f1_score(truth, said, average="macro"))
    assert agreement("f1", truth, said, 2) != pytest.approx(agreement("f1", truth, said, 3))


@pytest.mark.parametrize("metric", SCORES)
def test_a_constant_agrees_with_nothing(metric: Metric) -> None:
    assert agreement(metric, np.array([1.0, 2.0, 3.0]), np.full(3, 0.1)) == 0.0
    assert agreement(metric, np.full(3, 0.1), np.array([1.0, 2.0, 3.0])) == 0.0
    assert resampled(metric)(np.array([1.0, 2.0, 3.0]), np.full(3, 0.1)) == 0.0


def test_the_interval_of_accuracy_is_that_of_a_mean() -> None:
    truth, before = drawn("accuracy", 3, 50, 1)
    _, after = drawn("accuracy", 3, 50, 2)
    found = agreement_interval("accuracy", truth, before, after, 4, 3)
    wanted = paired_interval(before == truth, after == truth, 4)
    np.testing.assert_allclose(found, wanted, atol=0.021)  # other arrays are resampled, so other draws


@pytest.mark.parametrize(("metric", "labels"), [("f1", 2), ("matthews", 3), ("spearman", 0)])
def test_the_interval_is_scipys_of_the_librarys_score(metric: Metric, labels: int) -> None:
    """Of the forms that equal the library's, as above: a loop over few resamples could not tell 90% from 95%."""
    truth, before = drawn(metric, labels, 25, 3)
    _, after = drawn(metric, labels, 25, 4)

    form = resampled(metric, labels)

    def change(t: np.ndarray, b: np.ndarray, a: np.ndarray, axis: int = -1) -> np.ndarray:
        return form(t, a) - form(t, b)

    wanted = stats.bootstrap(
        (truth, before, after), change, paired=True, vectorized=True, n_resamples=9999, rng=np.random.default_rng(1)
    ).confidence_interval
    found = agreement_interval(metric, truth, before, after, 0, labels)
    np.testing.assert_allclose(found, (wanted.low, wanted.high), atol=0.025)
    assert found[0] < library(metric, truth, after, labels) - library(metric, truth, before, labels) < found[1]


def test_an_interval_is_the_same_for_the_same_seed_and_changes_sign_with_the_sides() -> None:
    truth, before = drawn("f1", 2, 30, 5)
    _, after = drawn("f1", 2, 30, 6)
    first = agreement_interval("f1", truth, before, after, 1, 2)
    assert agreement_interval("f1", truth, before, after, 1, 2) == first
    turned = agreement_interval("f1", truth, after, before, 1, 2)
    np.testing.assert_allclose(turned, (-first[1], -first[0]), atol=0.02)


@pytest.mark.parametrize(("metric", "labels"), [("matthews", 3), ("pearson", 0)])
def test_no_change_and_a_single_item_give_a_point(metric: Metric, labels: int) -> None:
    truth, said = drawn(metric, labels, 10, 7)
    assert agreement_interval(metric, truth, said, said, 0, labels) == (0.0, 0.0)
    low, high = agreement_interval(metric, truth[:1], said[:1], said[:1] + 1, 0, labels + 1)
    assert low == high


def test_an_interval_where_leaving_any_item_out_changes_nothing() -> None:
    truth, before, after = np.array([0, 1, 0, 1]), np.array([0, 0, 0, 0]), np.array([1, 1, 1, 1])
    low, high = agreement_interval("matthews", truth, before, after, 0, 2)
    assert (low, high) == (0.0, 0.0)
