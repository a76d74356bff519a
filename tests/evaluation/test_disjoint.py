from __future__ import annotations

import pytest

from keeptune.core.errors import DataError
from keeptune.evaluation.benchmark_data import Corpus, refuse_overlap


def corpus(where: str, *texts: str, rows: list[dict[str, object]] | None = None) -> Corpus:
    """Rows that differ from corpus to corpus unless given, with these texts."""
    return Corpus(where, rows or [{where: text} for text in texts], texts)


def refused(used: Corpus, scored: Corpus) -> DataError:
    with pytest.raises(DataError) as caught:
        refuse_overlap(used, scored)
    return caught.value


def test_disjoint_data_pass() -> None:
    refuse_overlap(corpus("train", "Where is A? B", "Where is C?"), corpus("test", "Where is D?", "Who is A?"))


def test_the_same_row_overlaps_whatever_its_template_makes_of_it() -> None:
    used = corpus("train", "one way", rows=[{"q": "A", "a": 1}])
    scored = corpus("test", "fresh", "another way", rows=[{"q": "B"}, {"a": 1, "q": "A"}])
    error = refused(used, scored)
    assert error.where == "test"
    assert "1 of 2 items that are in train too (items 2; 'another way')" in error.got


@pytest.mark.parametrize("prompt", ["where is the TOWER?", "  Where is\nthe  tower? "], ids=["case", "spaces"])
def test_the_same_prompt_overlaps_in_other_case_and_spacing(prompt: str) -> None:
    assert "(items 1;" in refused(corpus("train", "Where is the Tower?"), corpus("test", prompt)).got


def test_a_used_text_that_starts_with_the_prompt_overlaps() -> None:
    """Knowledge texts hold question and answer; the evaluation item's prompt is the question alone."""
    assert refused(corpus("knowledge", "Where is it? In Rome."), corpus("test", "Where is it?"))


def test_a_used_text_that_holds_the_prompt_elsewhere_does_not_overlap() -> None:
    refuse_overlap(corpus("knowledge", "He asked: Where is it?"), corpus("test", "Where is it?"))


def test_a_prompt_that_starts_with_a_used_text_does_not_overlap() -> None:
    refuse_overlap(corpus("train", "Where"), corpus("test", "Where is it?"))


def test_all_common_items_are_counted() -> None:
    assert "2 of 3 items" in refused(corpus("train", "a", "b", "d"), corpus("test", "b", "c", "a")).got
