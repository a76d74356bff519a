r"""Answers compared, scores of labels, changes with their intervals, and the summary scores K, T and KT.

The summary scores are those of FARSS (appendix A.3). With :math:`W_j` and :math:`W_j^{(0)}` the results on
knowledge benchmark j after and before fine-tuning, :math:`S_i` and :math:`S_i^{(FT)}` those on task benchmark
i of the method and of full fine-tuning,

.. math::
    K = \frac1M \sum_j \frac{W_j}{W_j^{(0)}} \;(36) \qquad
    T = \frac1N \sum_i \frac{S_i}{S_i^{(FT)}} \;(37) \qquad
    KT = \frac{2 K T}{K + T} \;(38)

LoKI's average forgetting, the mean relative drop on the knowledge benchmarks, is :math:`1 - K`. Extension: the paper
has accuracies only. For cross-entropies the ratio is that of the inverse perplexities, exp(before - after), so that 1
is "all kept" and less than 1 is worse here too.

Scores of labels are as scikit-learn's, correlations scipy's. A bootstrap needs them for thousands of resamples, so
:func:`resampled` has them over the last axis of an array, among them the Matthews correlation
coefficient for any number of labels (Gorodkin 2004),

.. math:: R_K = \frac{c s - \sum_k p_k t_k}{\sqrt{(s^2 - \sum_k p_k^2)(s^2 - \sum_k t_k^2)}}

(s items, c of them right, label k right t_k times and predicted p_k times). An undefined statistic (all predictions
equal) is 0, as in scikit-learn.
"""

import logging
import math
import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from keeptune.core.bootstrap import bootstrap
from keeptune.core.intervals import lower_is_better

_Asked = Literal["exact_match", "multiple_choice", "cross_entropy"]  # of language models
_Pair = Literal["preference_accuracy", "reward_accuracy"]  # of their likelihoods of a better and a worse answer
_Label = Literal["accuracy", "f1", "matthews"]  # of a classifier's labels
_Score = Literal["pearson", "spearman"]  # of a regression's scores
Metric = Literal[_Asked, _Pair, _Label, _Score]
ASKED, PAIRS, LABELS, SCORES = map(get_args, (_Asked, _Pair, _Label, _Score))
# Metrics of results: those above, and those of standard benchmarks.
Measure = Metric | Literal["accuracy_norm", "pass_at_1", "prompts_followed", "instructions_followed"]
Normalisation = Literal["qa", "exact"]

_LOG = logging.getLogger(__name__)
_ARTICLES = re.compile(r"\b(?:The |the |An |A |a |an )")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_Values = NDArray[Any]


def normalise_qa(text: str) -> str:
    """Returns the form of an answer that is compared: without case, punctuation, articles and outer white space.

    White space at the ends, articles followed by a space ("the", "The", but not "THE"), case and ASCII punctuation go,
    in this order, and then white space at the ends again: as lm-eval 0.4.13 does for ``nq_open`` (version 4.0), and but
    for the articles for ``triviaqa`` (3.0). They strip generated text once, before punctuation goes, and references
    never, so that "Paris ." does not equal "Paris" there and does here.

    >>> normalise_qa(" The U.S.A. ")
    'usa'
    """
    return _ARTICLES.sub("", text.strip()).lower().translate(_NO_PUNCTUATION).strip()


def exact_match(prediction: str, answers: Iterable[str], *, normalise: Normalisation = "qa") -> float:
    """Returns 1.0 if a prediction equals one of the accepted answers, else 0.0.

    ``"qa"`` compares by :func:`normalise_qa`, ``"exact"`` without white space at the ends. A prediction that is empty
    once normalised is wrong, even if an accepted answer ("?") is as empty.

    >>> exact_match(" the Eiffel tower.", ["Eiffel Tower", "La tour Eiffel"])
    1.0
    """
    form: Callable[[str], str] = normalise_qa if normalise == "qa" else str.strip
    predicted = form(prediction)
    return float(predicted != "" and predicted in {form(answer) for answer in answers})


def cut_at(text: str, stops: Sequence[str]) -> str:
    r"""Returns a text up to the earliest of several non-empty strings, the whole text if none occurs.

    >>> cut_at("Paris.\nQuestion:", ["\n", "."])
    'Paris'
    """
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places)] if places else text


def agreement(metric: Metric, truth: _Values, predicted: _Values, labels: int = 0) -> float:
    """Scores (n,) predictions: indices of a classifier's labels, or a regression's scores.

    F1 is that of label 1 where there are two labels, else the mean over all labels that are right or predicted
    somewhere; a correlation of a constant is 0.
    """
    if metric in SCORES:
        if np.ptp(truth) == 0 or np.ptp(predicted) == 0:
            return 0.0
        correlate = stats.pearsonr if metric == "pearson" else stats.spearmanr
        return float(correlate(truth, predicted).statistic)
    return float(resampled(metric, labels)(truth, predicted))


def agreement_interval(
    metric: Metric, truth: _Values, before: _Values, after: _Values, seed: int, labels: int = 0
) -> tuple[float, float]:
    """Computes a 95% bootstrap interval of the change of :func:`agreement`, items resampled with both predictions.

    Low and high end are as of :func:`paired_interval`; equal predictions, or a single item, give a point.
    """
    statistic = resampled(metric, labels)

    def change(truth: _Values, before: _Values, after: _Values, axis: int) -> _Values:
        assert axis == -1
        return statistic(truth, after) - statistic(truth, before)

    if truth.size < 2 or np.array_equal(before, after):
        point = float(change(truth, before, after, -1))
        return point, point
    return bootstrap((truth, before, after), change, seed)


def resampled(metric: Metric, labels: int = 0) -> Callable[[_Values, _Values], _Values]:
    """Returns :func:`agreement` as a function of right and predicted values, ``(..., n)`` each, to ``(...,)``."""
    functions: Mapping[str, Callable[[_Values, _Values], _Values]] = {
        "accuracy": lambda truth, predicted: np.asarray((truth == predicted).mean(axis=-1)),
        "f1": partial(_f1, labels=labels),
        "matthews": partial(_matthews, labels=labels),
        "pearson": _pearson,
        "spearman": lambda truth, predicted: _pearson(*(stats.rankdata(v, axis=-1) for v in (truth, predicted))),
    }
    return functions[metric]


def _counts(truth: _Values, predicted: _Values, labels: int) -> tuple[_Values, _Values, _Values]:
    """Counts per label how often it is right, predicted, and both: (labels, ...) each, float64."""
    each = [(truth == k, predicted == k, (truth == k) & (predicted == k)) for k in range(labels)]
    t, p, both = (np.stack([one.sum(axis=-1) for one in ones]).astype(np.float64) for ones in zip(*each, strict=True))
    return t, p, both


def _f1(truth: _Values, predicted: _Values, labels: int) -> _Values:
    t, p, both = _counts(truth, predicted, labels)
    each = _ratio(2 * both, t + p)
    if labels == 2:
        return np.asarray(each[1])
    return _ratio(each.sum(axis=0), ((t + p) > 0).sum(axis=0))


def _matthews(truth: _Values, predicted: _Values, labels: int) -> _Values:
    t, p, both = _counts(truth, predicted, labels)
    s = float(truth.shape[-1])
    top = both.sum(axis=0) * s - (p * t).sum(axis=0)
    return _ratio(top, np.sqrt((s**2 - (p**2).sum(axis=0)) * (s**2 - (t**2).sum(axis=0))))


def _pearson(truth: _Values, predicted: _Values) -> _Values:
    x, y = (v - v.mean(axis=-1, keepdims=True) for v in (truth.astype(np.float64), predicted.astype(np.float64)))
    # Rounding leaves a little of a constant.
    x, y = (np.where(np.ptp(raw, axis=-1, keepdims=True) > 0, v, 0.0) for raw, v in ((truth, x), (predicted, y)))
    return _ratio((x * y).sum(axis=-1), np.sqrt((x**2).sum(axis=-1) * (y**2).sum(axis=-1)))


def _ratio(top: _Values, bottom: _Values) -> _Values:
    return np.asarray(np.divide(top, bottom, out=np.zeros_like(top, dtype=np.float64), where=bottom > 0))


def mean_ratio(scores: Iterable[tuple[str, Measure, float, float]], score: str, reason: str) -> float | None:
    """Computes K or T (FARSS, eq. 36 and 37): the mean of benchmarks' scores over their references.

    Args:
        scores: Of each benchmark the name, the metric, the score and the reference: the result before fine-tuning for
            K, that of full fine-tuning for T. One with a reference of 0 is left out with a warning.
        score: ``"K"`` or ``"T"``, for the warning.
        reason: Why a benchmark is left out, for the warning.

    Returns:
        1 for equal scores, less for worse ones; None if no benchmark is left.
    """
    ratios = []
    for name, metric, value, reference in scores:
        if lower_is_better(metric):
            ratios.append(math.exp(reference - value))  # of inverse perplexities
        elif reference:
            ratios.append(value / reference)
        else:
            _LOG.warning("%s leaves out the benchmark %s: %s.", score, name, reason)
    return math.fsum(ratios) / len(ratios) if ratios else None


def harmonic(kept: float | None, learned: float | None) -> float | None:
    """Computes KT, the harmonic mean of K and T (FARSS, eq. 38): 0 if both are 0, None if one is None.

    >>> harmonic(1.0, 0.5)
    0.6666666666666666
    """
    if kept is None or learned is None:
        return None
    return 2 * kept * learned / (kept + learned) if kept + learned else 0.0
