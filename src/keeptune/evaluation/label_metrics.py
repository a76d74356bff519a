r"""How well labels and scores agree with the right ones: one number for a whole set, and its change with an interval.

The numbers are scikit-learn's and scipy's. A bootstrap needs them for thousands of resamples, so that the same
statistics are here once more, over the last axis of an array: accuracy, F1, the Matthews correlation coefficient in
its form for any number of labels (Gorodkin 2004),

.. math:: R_K = \frac{c s - \sum_k p_k t_k}{\sqrt{(s^2 - \sum_k p_k^2)(s^2 - \sum_k t_k^2)}}

(s items, c of them right, label k right t_k times and said p_k times), Pearson's r, and Spearman's, which is
Pearson's of the ranks. Where a statistic is not defined (all predictions equal) it is 0, as scikit-learn has it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats
from sklearn import metrics

from keeptune.evaluation.benchmarks import Metric

__all__ = ["agreement", "agreement_interval", "resampled"]

Values = NDArray[Any]
_RESAMPLES = 9999
_BATCH_ELEMENTS = 2**22  # resampled values held at a time


def agreement(metric: Metric, truth: Values, said: Values, labels: int = 0) -> float:
    """Score predictions with the library that owns the metric.

    Args:
        metric: ``accuracy``, ``f1``, ``matthews``, ``pearson`` or ``spearman``.
        truth: ``(n,)``, indices of labels, or scores.
        said: ``(n,)``, what the model says.
        labels: How many labels the model tells apart.

    Returns:
        The score. F1 is that of label 1 where there are two labels, else the mean over all labels that are right
        or said somewhere; a correlation of a constant is 0.
    """
    if metric in ("pearson", "spearman"):
        if np.ptp(truth) == 0 or np.ptp(said) == 0:
            return 0.0
        correlate = stats.pearsonr if metric == "pearson" else stats.spearmanr
        return float(correlate(truth, said).statistic)
    with warnings.catch_warnings():
        # One label in all: scikit-learn wonders whether it is a regression.
        warnings.simplefilter("ignore", UserWarning)
        if metric == "accuracy":
            return float(metrics.accuracy_score(truth, said))
        if metric == "matthews":
            return float(metrics.matthews_corrcoef(truth, said))
        average = "binary" if labels == 2 else "macro"
        return float(metrics.f1_score(truth, said, average=average, zero_division=0))


def agreement_interval(
    metric: Metric, truth: Values, before: Values, after: Values, seed: int, labels: int = 0
) -> tuple[float, float]:
    """Compute a 95% bootstrap interval of the change of a whole set's score, items resampled with both predictions.

    Args:
        metric: The metric.
        truth: ``(n,)``, the right labels or scores.
        before: ``(n,)``, predictions of the base model.
        after: ``(n,)``, predictions of the tuned model.
        seed: Seed of the resampling.
        labels: How many labels the model tells apart.

    Returns:
        Low and high end, by the bias-corrected and accelerated bootstrap; by percentiles where that is not
        defined. Predictions that did not change, or a single item, give a point.
    """
    statistic = resampled(metric, labels)

    def change(truth: Values, before: Values, after: Values, axis: int) -> Values:
        assert axis == -1
        return statistic(truth, after) - statistic(truth, before)

    if truth.size < 2 or np.array_equal(before, after):
        point = float(change(truth, before, after, -1))
        return point, point
    for method in ("BCa", "percentile"):
        with warnings.catch_warnings():
            # Looked for below as NaN, which is all that these warnings say.
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)
            warnings.filterwarnings("ignore", "invalid value encountered", RuntimeWarning)
            found = stats.bootstrap(
                (truth, before, after),
                change,
                paired=True,
                vectorized=True,
                axis=-1,
                confidence_level=0.95,
                n_resamples=_RESAMPLES,
                batch=max(1, _BATCH_ELEMENTS // truth.size),
                method=method,
                rng=np.random.default_rng(seed),
            ).confidence_interval
        if np.isfinite([found.low, found.high]).all():
            break
    return float(found.low), float(found.high)


def resampled(metric: Metric, labels: int = 0) -> Callable[[Values, Values], Values]:
    """Give a metric as a function of many sets at once.

    Law: of one set, it is :func:`agreement`.

    Args:
        metric: The metric.
        labels: How many labels the model tells apart.

    Returns:
        A function of right and predicted values, ``(..., n)`` each, to ``(...,)``.
    """
    functions: Mapping[str, Callable[[Values, Values], Values]] = {
        "accuracy": lambda truth, said: np.asarray((truth == said).mean(axis=-1)),
        "f1": lambda truth, said: _f1(truth, said, labels),
        "matthews": lambda truth, said: _matthews(truth, said, labels),
        "pearson": _pearson,
        "spearman": _spearman,
    }
    return functions[metric]


def _counts(truth: Values, said: Values, labels: int) -> tuple[Values, Values, Values]:
    """Count per label how often it is right, said, and both: ``(labels, ...)`` each, float64."""
    t, p, both = (
        np.stack([one.sum(axis=-1) for one in ones]).astype(np.float64)
        for ones in (
            [truth == k for k in range(labels)],
            [said == k for k in range(labels)],
            [(truth == k) & (said == k) for k in range(labels)],
        )
    )
    return t, p, both


def _f1(truth: Values, said: Values, labels: int) -> Values:
    t, p, both = _counts(truth, said, labels)
    each = _ratio(2 * both, t + p)
    if labels == 2:
        return np.asarray(each[1])
    return _ratio(each.sum(axis=0), ((t + p) > 0).sum(axis=0))


def _matthews(truth: Values, said: Values, labels: int) -> Values:
    t, p, both = _counts(truth, said, labels)
    s = float(truth.shape[-1])
    top = both.sum(axis=0) * s - (p * t).sum(axis=0)
    return _ratio(top, np.sqrt((s**2 - (p**2).sum(axis=0)) * (s**2 - (t**2).sum(axis=0))))


def _pearson(truth: Values, said: Values) -> Values:
    x, y = (v - v.mean(axis=-1, keepdims=True) for v in (truth.astype(np.float64), said.astype(np.float64)))
    # Rounding leaves a little of a constant.
    x, y = (np.where(np.ptp(raw, axis=-1, keepdims=True) > 0, v, 0.0) for raw, v in ((truth, x), (said, y)))
    return _ratio((x * y).sum(axis=-1), np.sqrt((x**2).sum(axis=-1) * (y**2).sum(axis=-1)))


def _spearman(truth: Values, said: Values) -> Values:
    return _pearson(stats.rankdata(truth, axis=-1), stats.rankdata(said, axis=-1))


def _ratio(top: Values, bottom: Values) -> Values:
    return np.asarray(np.divide(top, bottom, out=np.zeros_like(top, dtype=np.float64), where=bottom > 0))
