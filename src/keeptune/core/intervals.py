"""The one rule for 95% intervals, and which metrics are better when lower.

A score of one run has an *item interval*: a paired bootstrap over the items of its benchmark. With the values v_i of n
seeds and their item intervals [a_i, b_i], the estimate is the mean with the hull of two intervals:

    mean(v) +- t(n - 1, 0.975) sd(v) / sqrt(n)        over the seeds (Student's)                        (1)
    [mean(a), mean(b)]                                over the items                                    (2)

Seeds are scored on the same items, so averaging them does not narrow (2). With one seed there is only (2), without item
intervals only (1), and with neither the ends are NaN. Pages, tables, comparisons, sweeps and sequences use this rule.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

Triple = tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds, of one value each, with its 95% interval; the ends are NaN where there is none."""

    mean: float
    low: float
    high: float
    values: tuple[float, ...]

    @property
    def has_interval(self) -> bool:
        """Whether both ends are numbers."""
        return math.isfinite(self.low) and math.isfinite(self.high)

    @property
    def sd(self) -> float:
        """Standard deviation over the seeds (n - 1 below); NaN with one seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else math.nan  # exact: 0 for equal values


def lower_is_better(metric: str) -> bool:
    """Returns whether a smaller value of a metric is the better one: true of cross entropies."""
    return metric == "cross_entropy"


def t_half_width(values: Sequence[float]) -> float:
    """Returns half the width of the 95% t-interval of a mean (eq. 1); NaN for fewer than two values."""
    count = len(values)
    if count < 2:
        return math.nan
    deviation = statistics.stdev(values)  # exact: 0 for equal values
    return float(stdtrit(count - 1, 0.975)) * deviation / math.sqrt(count)


def combine(triples: Sequence[Triple]) -> Estimate | None:
    """Combines seeds by the rule of this module; None without a value.

    Args:
        triples: Value and ends of the item interval of every seed; ends may be NaN, and seeds without a finite value
            are left out.

    >>> combine([(1.0, 0.5, 1.5)])
    Estimate(mean=1.0, low=0.5, high=1.5, values=(1.0,))
    """
    good = [triple for triple in triples if math.isfinite(triple[0])]
    if not good:
        return None
    values = tuple(triple[0] for triple in good)
    mean = math.fsum(values) / len(values)
    half = t_half_width(values)
    lows = (mean - half, math.fsum(triple[1] for triple in good) / len(good))
    highs = (mean + half, math.fsum(triple[2] for triple in good) / len(good))
    low = min((value for value in lows if math.isfinite(value)), default=math.nan)
    high = max((value for value in highs if math.isfinite(value)), default=math.nan)
    return Estimate(mean, low, high, values)


def mean_of_seeds(values: Sequence[float]) -> Estimate | None:
    """Combines values without item intervals (eq. 1); those that are not finite are left out."""
    return combine([(value, math.nan, math.nan) for value in values])


def clearly_above(one: Estimate, other: Estimate) -> bool:
    """Returns whether both estimates have intervals and the first lies wholly above the second."""
    return one.has_interval and other.has_interval and one.low > other.high
