from __future__ import annotations

import logging
import math
import re
import string

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from keeptune.core.bootstrap import paired_interval
from keeptune.core.errors import StatisticsError
from keeptune.evaluation.metrics import (
    Metric,
    cut_at,
    exact_match,
    harmonic,
    mean_ratio,
    normalise_qa,
)

ARTICLES = r"\b(?:The |the |An |A |The |a |an )"  # as in lm-eval's nq_open.yaml
WORDS = ["The", "the", "an", "A", "a", "THE", "cat", "Theodore", "U.S.", "é", "1912", "'s", ",", "a-b", ""]
# numpy, which lm-eval uses, drops NUL at the end and has no room for the longer lower case of İ.
LETTERS = st.characters(codec="utf-8", exclude_characters="\x00İ", categories=["L", "N", "P", "Zs"])
ANSWERS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).map(" ".join) | st.text(LETTERS, max_size=8)
SCORES = st.floats(0.01, 1.0)


def kept(pairs: list[tuple[float, float]], metric: Metric = "exact_match", score: str = "K") -> float | None:
    """The mean ratio over benchmarks of (reference, value)."""
    scores = [(str(index), metric, value, reference) for index, (reference, value) in enumerate(pairs)]
    return mean_ratio(scores, score, "it is 0")


def has_loose_ends(text: str, articles: bool) -> bool:
    bare = re.sub(ARTICLES, "", text) if articles else text
    bare = "".join(letter for letter in bare if letter not in string.punctuation)
    return bare != bare.strip()


@pytest.mark.parametrize("task", ["nq_open", "triviaqa"])
@settings(deadline=None, max_examples=300)
@given(prediction=ANSWERS, answer=ANSWERS)
@example(prediction=" The cat.", answer="cat")
@example(prediction="THE cat", answer="cat")
@example(prediction="Paris .", answer="Paris")
def test_normalise_equals_lm_eval(task: str, prediction: str, answer: str) -> None:
    metrics = pytest.importorskip("lm_eval.api.metrics")
    articles = task == "nq_open"
    # Its filter remove_whitespace does the one, load_items the other.
    prediction, answer = prediction.strip(), answer.strip()
    assume(articles or not any(re.search(ARTICLES, text) for text in (prediction, answer)))
    assume(normalise_qa(prediction))
    theirs = metrics.exact_match_hf_evaluate(
        [prediction], [answer], [ARTICLES] if articles else None, ignore_case=True, ignore_punctuation=True
    )
    ours = exact_match(prediction, [answer])
    loose = has_loose_ends(prediction, articles) or has_loose_ends(answer, articles)
    assert ours == theirs["exact_match"] or (ours and loose)


@settings(deadline=None)
@given(ANSWERS)
def test_normalise_ignores_case_and_outer_white_space(text: str) -> None:
    assert normalise_qa(f"  {text}\t") == normalise_qa(text)
    assert normalise_qa(text) == normalise_qa(text).strip().lower()


def test_exact_match() -> None:
    assert exact_match("an Eiffel Tower!", ["x", "The eiffel tower"]) == 1.0
    assert exact_match("Eiffel", ["Eiffel Tower"]) == 0.0
    assert exact_match("THE cat", ["cat"]) == 0.0  # lm-eval's pattern knows "The" and "the" only
    assert exact_match("", ["?"]) == exact_match("!", ["?"]) == 0.0
    assert exact_match(" Ann ", ["Ann"], normalise="exact") == 1.0
    assert exact_match("ann", ["Ann"], normalise="exact") == 0.0


def test_cut_at_takes_the_earliest() -> None:
    assert cut_at("a.b\nc", ["\n", "."]) == "a"
    assert cut_at("a.b", []) == cut_at("a.b", ["\n"]) == "a.b"
    assert cut_at("\na", ["\n"]) == ""


@settings(deadline=None)
@given(st.lists(st.tuples(SCORES, SCORES), min_size=1, max_size=6))
def test_k_and_t_are_mean_ratios(pairs: list[tuple[float, float]]) -> None:
    plain = sum(value / reference for reference, value in pairs) / len(pairs)
    assert kept(pairs) == pytest.approx(plain)


@settings(deadline=None)
@given(st.lists(SCORES, min_size=1, max_size=6))
def test_nothing_lost_is_one(scores: list[float]) -> None:
    assert kept([(score, score) for score in scores]) == 1.0
    assert kept([(score, score) for score in scores], "cross_entropy") == 1.0


@settings(deadline=None)
@given(st.floats(0, 10), st.floats(0, 10))
def test_cross_entropy_ratio_is_that_of_perplexities(before: float, after: float) -> None:
    ratio = kept([(before, after)], "cross_entropy")
    assert ratio == pytest.approx(math.exp(before) / math.exp(after))
    assert ratio is not None and (ratio < 1) == (math.exp(before - after) < 1)


@settings(deadline=None)
@given(st.floats(0, 5), st.floats(0, 5))
def test_harmonic_lies_between_and_is_symmetric(kept: float, learned: float) -> None:
    found = harmonic(kept, learned)
    assert found is not None
    assert found == harmonic(learned, kept)
    assert min(kept, learned) - 1e-12 <= found <= max(kept, learned) + 1e-12


def test_harmonic_edges() -> None:
    assert harmonic(0.0, 0.0) == 0.0
    assert harmonic(0.0, 1.0) == 0.0
    assert harmonic(None, 1.0) is None
    assert harmonic(1.0, None) is None


def test_a_reference_of_zero_is_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert kept([(0.0, 0.3), (0.5, 0.25)]) == 0.5
        assert kept([(0.0, 0.3)], score="T") is None
    assert "K leaves out the benchmark 0" in caplog.text
    assert "T leaves out the benchmark 0" in caplog.text
    assert kept([]) is None


def test_interval_of_identical_scores_is_a_point_at_zero() -> None:
    scores = np.array([0.0, 1.0, 1.0, 0.0])
    assert paired_interval(scores, scores, 0) == (0.0, 0.0)
    assert paired_interval([1.0], [1.0], 0) == (0.0, 0.0)


def test_interval_of_equal_changes_is_a_point() -> None:
    before = np.array([1.0, 2.0, 3.0])
    assert paired_interval(before, before - 0.25, 0) == (-0.25, -0.25)
    weights = np.array([1.0, 2.0, 4.0])
    low, high = paired_interval(before * weights, (before + 0.1) * weights, 0, weights=weights)
    assert low == high == pytest.approx(0.1)


@settings(deadline=None, max_examples=15)
@given(
    st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0])), min_size=1, max_size=30),
    st.integers(0, 5),
)
def test_interval_of_zeros_and_ones(pairs: list[tuple[float, float]], seed: int) -> None:
    """Finite, in range, around the estimate, repeatable, and without warnings (they are errors here)."""
    before, after = np.array(pairs).T
    low, high = paired_interval(before, after, seed)
    change = float((after - before).mean())
    assert -1 <= low <= high <= 1
    assert low - 1e-9 <= change <= high + 1e-9
    assert paired_interval(before, after, seed) == (low, high)


def test_interval_with_weights_matches_the_delta_method() -> None:
    rng = np.random.default_rng(0)
    weights = rng.integers(5, 200, size=400).astype(float)
    rates = 0.1 + 0.3 * rng.standard_normal(400)
    low, high = paired_interval(np.zeros(400), rates * weights, 1, weights=weights)
    ratio = (rates * weights).sum() / weights.sum()
    error = np.std(rates * weights - ratio * weights) / (weights.mean() * 20)
    assert (low, high) == pytest.approx((ratio - 1.96 * error, ratio + 1.96 * error), abs=0.15 * error)


def test_interval_covers_the_truth() -> None:
    """Nominal 95%; 60 simulations of 120 items must miss at most 9 times (p = 0.002 if nominal)."""
    rng = np.random.default_rng(3)
    hits = 0
    for seed in range(60):
        before = (rng.random(120) < 0.6).astype(float)
        forgotten = rng.random(120) < 0.2
        low, high = paired_interval(before, np.where(forgotten, 0.0, before), seed)
        hits += low <= -0.12 <= high
    assert 51 <= hits <= 60


@pytest.mark.parametrize(
    ("before", "after", "weights"),
    [([], [], None), ([1.0], [1.0, 2.0], None), ([1.0, math.nan], [1.0, 2.0], None), ([1.0], [2.0], [0.0])],
)
def test_interval_refuses_bad_values(before: list[float], after: list[float], weights: list[float] | None) -> None:
    with pytest.raises(StatisticsError, match="interval"):
        paired_interval(before, after, 0, weights=weights)
