r"""Answers compared, changes with their intervals, and the summary scores K, T and KT.

The summary scores are those of FARSS (appendix A.3). With :math:`W_j` and :math:`W_j^{(0)}` the results on
knowledge benchmark j after and before fine-tuning, :math:`S_i` and :math:`S_i^{(FT)}` those on task benchmark
i of the method and of full fine-tuning,

.. math::
    K = \frac1M \sum_j \frac{W_j}{W_j^{(0)}} \;(36) \qquad
    T = \frac1N \sum_i \frac{S_i}{S_i^{(FT)}} \;(37) \qquad
    KT = \frac{2 K T}{K + T} \;(38)

LoKI's average forgetting, the mean relative drop on the knowledge benchmarks, is :math:`1 - K`.

Extension: the paper has accuracies only. For cross-entropies, where lower is better, the ratio is that of the
perplexities turned over, exp(before - after), so that 1 is "all kept" and less than 1 is worse here too.
"""

from __future__ import annotations

import logging
import math
import re
import string
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from keeptune.core.errors import StatisticsError
from keeptune.evaluation.benchmarks import Measure, Normalisation

__all__ = [
    "Change",
    "average_forgetting",
    "cut_at",
    "exact_match",
    "harmonic",
    "knowledge_kept",
    "normalise_exact",
    "normalise_qa",
    "paired_interval",
    "task_learned",
]

_LOG = logging.getLogger(__name__)
_ARTICLES = re.compile(r"\b(?:The |the |An |A |a |an )")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_RESAMPLES = 9999
_BATCH_ELEMENTS = 2**22  # resampled values held at a time, 32 MiB as float64


def normalise_qa(text: str) -> str:
    """Bring an answer into the form in which it is compared.

    White space at the ends, articles followed by a space ("the", "The", but not "THE"), case and ASCII
    punctuation go, in this order, and then white space at the ends again. This is what lm-eval 0.4.13 does
    for ``nq_open`` (version 4.0), and for ``triviaqa`` (version 3.0) except that ``triviaqa`` keeps the
    articles. One difference from both: they strip generated text once, before punctuation goes, and
    references never, so that "Paris ." does not equal "Paris" there and does here.

    Args:
        text: An answer.

    Returns:
        Its normal form, possibly empty.

    >>> normalise_qa(" The U.S.A. ")
    'usa'
    """
    return _ARTICLES.sub("", text.strip()).lower().translate(_NO_PUNCTUATION).strip()


def normalise_exact(text: str) -> str:
    """Leave an answer as it is but for white space at its ends.

    Args:
        text: An answer.

    Returns:
        The stripped answer.
    """
    return text.strip()


def exact_match(prediction: str, answers: Iterable[str], *, normalise: Normalisation = "qa") -> float:
    """Say whether a prediction equals one of the accepted answers.

    A prediction without a letter or digit left is wrong, even if an alias ("?") is as empty as it.

    Args:
        prediction: Generated text.
        answers: Accepted answers.
        normalise: How both are normalised before they are compared.

    Returns:
        1.0 or 0.0.

    >>> exact_match(" the Eiffel tower.", ["Eiffel Tower", "La tour Eiffel"])
    1.0
    """
    form = {"qa": normalise_qa, "exact": normalise_exact}[normalise]
    found = form(prediction)
    return float(found != "" and found in {form(answer) for answer in answers})


def cut_at(text: str, stops: Sequence[str]) -> str:
    r"""Cut a text before the first of several strings.

    Args:
        text: The text.
        stops: Strings of one character or more.

    Returns:
        The text up to the place where the earliest of them begins; the whole text if none occurs.

    >>> cut_at("Paris.\nQuestion:", ["\n", "."])
    'Paris'
    """
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text


def paired_interval(
    before: ArrayLike, after: ArrayLike, seed: int, *, weights: ArrayLike | None = None
) -> tuple[float, float]:
    """Compute a 95% bootstrap interval of the change of a mean, items resampled as pairs.

    The change is sum(after - before) / sum(weights): with weights 1 the mean difference; with losses summed
    over the tokens of each document and token counts as weights the change in nats per token, where long
    documents weigh more and the resampled denominator varies as it should.

    Args:
        before: (n,) values per item.
        after: (n,) values of the same items.
        seed: Seed of the resampling.
        weights: (n,) positive weights; None for ones.

    Returns:
        Low and high end, by the bias-corrected and accelerated bootstrap; by percentiles where that is not
        defined. Items that all changed equally, or a single item, give a point.

    Raises:
        StatisticsError: No items, lengths that differ, or values that are not finite.
    """
    change, counts = _checked(before, after, weights)
    rates = change / counts
    if np.ptp(rates) <= 1e-12 * np.abs(rates).max():
        point = float(change.sum() / counts.sum())
        return point, point
    interval = _bootstrap(change, counts, seed, "BCa")
    if not np.isfinite(interval).all():
        interval = _bootstrap(change, counts, seed, "percentile")
    return interval


def _checked(
    before: ArrayLike, after: ArrayLike, weights: ArrayLike | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    first, second = (
        np.asarray(before, dtype=np.float64),
        np.asarray(after, dtype=np.float64),
    )
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
    return second - first, counts


def _bootstrap(change: NDArray[np.float64], counts: NDArray[np.float64], seed: int, method: str) -> tuple[float, float]:
    with warnings.catch_warnings():
        # The caller looks for NaN, which is all that this warning says.
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)
        interval = stats.bootstrap(
            (change, counts),
            lambda d, w, axis: d.sum(axis=axis) / w.sum(axis=axis),
            paired=True,
            vectorized=True,
            confidence_level=0.95,
            n_resamples=_RESAMPLES,
            batch=max(1, _BATCH_ELEMENTS // change.size),
            method=method,
            rng=np.random.default_rng(seed),
        ).confidence_interval
    return float(interval.low), float(interval.high)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A result beside the one it is measured against.

    Args:
        name: The benchmark.
        metric: Its metric; cross-entropies in nats per token, the others fractions.
        reference: The result before fine-tuning (for K) or after full fine-tuning (for T).
        value: The result of the model in question.
    """

    name: str
    metric: Measure
    reference: float
    value: float

    @property
    def ratio(self) -> float | None:
        """Value over reference, perplexities turned over; None where the reference is 0."""
        if self.metric == "cross_entropy":
            return math.exp(self.reference - self.value)
        return self.value / self.reference if self.reference else None


def knowledge_kept(changes: Iterable[Change]) -> float | None:
    """Compute K, the mean share of the original results that is kept (FARSS, eq. 36).

    Args:
        changes: Knowledge benchmarks; the reference is the result before fine-tuning.

    Returns:
        1 if nothing was lost; None if no benchmark can tell. A benchmark on which the model scored 0 before
        cannot measure forgetting; it is left out and a warning logged.

    >>> knowledge_kept([Change(name="facts", metric="exact_match", reference=0.5, value=0.4)])
    0.8
    """
    return _mean_ratio(changes, "K", "the model scored 0 on it before fine-tuning")


def task_learned(changes: Iterable[Change]) -> float | None:
    """Compute T, the mean result relative to full fine-tuning (FARSS, eq. 37).

    Args:
        changes: Task benchmarks; the reference is the result after full fine-tuning.

    Returns:
        1 if the method learns as much as full fine-tuning; None if no benchmark can tell. A benchmark on
        which full fine-tuning scored 0 is left out and a warning logged.
    """
    return _mean_ratio(changes, "T", "full fine-tuning scored 0 on it")


def _mean_ratio(changes: Iterable[Change], score: str, reason: str) -> float | None:
    ratios = []
    for change in changes:
        if change.ratio is None:
            _LOG.warning("%s leaves out the benchmark %s: %s.", score, change.name, reason)
        else:
            ratios.append(change.ratio)
    return math.fsum(ratios) / len(ratios) if ratios else None


def average_forgetting(kept: float | None) -> float | None:
    """Compute the mean relative drop over knowledge benchmarks, ``mean_j (W_j^(0) - W_j) / W_j^(0)`` (LoKI's Avg).

    Args:
        kept: K, the mean of ``W_j / W_j^(0)``.

    Returns:
        ``1 - K``: 0 if nothing was lost, negative if something was gained; None if K is.

    >>> average_forgetting(0.75)
    0.25
    """
    return None if kept is None else 1.0 - kept


def harmonic(kept: float | None, learned: float | None) -> float | None:
    """Compute KT, the harmonic mean of K and T (FARSS, eq. 38).

    Args:
        kept: K.
        learned: T.

    Returns:
        KT; 0 if both are 0, None if one is None.

    >>> harmonic(1.0, 0.5)
    0.6666666666666666
    """
    if kept is None or learned is None:
        return None
    return 2 * kept * learned / (kept + learned) if kept + learned else 0.0
