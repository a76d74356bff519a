"""Bootstrap intervals of changes, items resampled as pairs (the item intervals of core/intervals.py)."""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from keeptune.core.errors import StatisticsError

_RESAMPLES = 9999
_BATCH_ELEMENTS = 2**22  # resampled values held at a time, 32 MiB as float64
_Values = NDArray[Any]


def paired_interval(
    before: ArrayLike, after: ArrayLike, seed: int, *, weights: ArrayLike | None = None
) -> tuple[float, float]:
    """Computes a 95% bootstrap interval of the change of a mean, items resampled as pairs.

    The change is sum(after - before) / sum(weights) of (n,) values per item and positive weights: with weights 1 the
    mean difference; with losses summed over the tokens of each document and token counts as weights the change in nats
    per token, where long documents weigh more and the resampled denominator varies as it should.

    Returns:
        Low and high end, by the bias-corrected and accelerated bootstrap; by percentiles where that is not
        defined. Items that all changed equally, or a single item, give a point.

    Raises:
        StatisticsError: No items, lengths that differ, or values that are not finite.
    """
    first, second = np.asarray(before, dtype=np.float64), np.asarray(after, dtype=np.float64)
    counts = np.ones_like(first) if weights is None else np.asarray(weights, dtype=np.float64)
    if not first.size or not first.shape == second.shape == counts.shape == (first.size,):
        raise StatisticsError(
            "interval",
            got=f"shapes {first.shape}, {second.shape} and {counts.shape}",
            wanted="one value per item before and after, at least one item",
            next_step="Score the same items before and after.",
        )
    if not (np.isfinite(first).all() and np.isfinite(second).all() and (counts > 0).all()):
        raise StatisticsError(
            "interval",
            got="values that are not finite, or weights that are not positive",
            wanted="finite values and positive weights",
            next_step="Look for items whose score is missing.",
        )
    change = second - first
    rates = change / counts
    if np.ptp(rates) <= 1e-12 * np.abs(rates).max():
        point = float(change.sum() / counts.sum())
        return point, point
    return bootstrap((change, counts), lambda d, w, axis: d.sum(axis=axis) / w.sum(axis=axis), seed)


def bootstrap(data: tuple[_Values, ...], statistic: Callable[..., _Values], seed: int) -> tuple[float, float]:
    """Returns a 95% interval of a statistic, the rows of all arrays resampled together."""
    for method in ("BCa", "percentile"):
        with warnings.catch_warnings():
            # Both warn of the NaN that the check below looks for.
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)
            warnings.filterwarnings("ignore", "invalid value encountered", RuntimeWarning)
            interval = stats.bootstrap(
                data,
                statistic,
                paired=True,
                vectorized=True,
                axis=-1,
                confidence_level=0.95,
                n_resamples=_RESAMPLES,
                batch=max(1, _BATCH_ELEMENTS // data[0].size),
                method=method,
                rng=np.random.default_rng(seed),
            ).confidence_interval
        if np.isfinite([interval.low, interval.high]).all():
            break
    return float(interval.low), float(interval.high)
