"""Knowledge sets: texts or pairs, joined; what is learned of each, and the first examples of each."""

from __future__ import annotations

from typing import Any

import pytest
from tests.data.test_calibration import words as plain_tokenizer
from tests.models import calibration, task

from keeptune.core.errors import DataError
from keeptune.data.calibration import Calibration
from keeptune.data.completions import joined_knowledge, knowledge_of, knowledge_set

TEXTS = Calibration(((5, 6, 7), (8, 9), (4, 4, 4, 4)), 0)
PAIRS = Calibration.of_answers(((1, 2, 3, 4), (3, 2, 1)), 0, (2, 1))


def test_rows_become_texts_or_pairs() -> None:
    rows = [{"q": "a?", "a": "b"}, {"q": "c?", "a": "d"}]
    texts = knowledge_set(rows, text="{q} {a}", where="knowledge")
    pairs = knowledge_set(rows, prompt="{q}", completion=" {a}", where="knowledge")
    assert (texts.prompts, texts.completions) == (None, ("a? b", "c? d"))
    assert (pairs.prompts, pairs.completions) == (("a?", "c?"), (" b", " d"))
    assert texts.read_texts == pairs.read_texts == ["a? b", "c? d"]
    with pytest.raises(DataError, match=r'knowledge\.1 row 2: .*"q"'):
        knowledge_set([rows[0], {"a": "x"}], prompt="{q}", completion="{a}", where="knowledge.1")


def test_texts_and_pairs_from_python() -> None:
    assert knowledge_of(["a", "b"]) == knowledge_set([{"t": "a"}, {"t": "b"}], text="{t}", where="knowledge")
    assert knowledge_of([("a", "b")]).read_texts == ["ab"]
    for mixed in (["a", ("b", "c")], [("a", "b", "c")]):
        with pytest.raises(DataError, match="different forms"):
            knowledge_of(mixed)  # type: ignore[arg-type]


def test_the_completion_alone_is_learned_and_nothing_is_appended() -> None:
    read = plain_tokenizer()
    data = knowledge_of([("a b", " c d"), ("", "a b c")]).calibration(read, max_length=8)
    assert data.sequences == tuple(map(tuple, read(["a b c d", "a b c"])["input_ids"]))
    assert data.prompts == (2, 0)
    assert data.learned_tokens == 2 + 2


def test_what_has_no_room_is_left_out_and_nothing_at_all_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    read = plain_tokenizer()
    data = knowledge_of([("a b c", " d"), ("a", " b c d")]).calibration(read, max_length=3)
    assert data.sequences == (tuple(read("a b c")["input_ids"]),)
    assert data.prompts == (1,)
    assert "1 examples have nothing to learn within 3 tokens" in caplog.text
    with pytest.raises(DataError, match=r"nothing to learn within 3 tokens.*Raise knowledge.max_length \(3\)"):
        knowledge_of([("a b c", " d")]).calibration(read, max_length=3)
    with pytest.raises(DataError, match="example 2: got an empty completion"):
        knowledge_of([("a", " b"), ("a", " ")]).calibration(read, max_length=3)
    with pytest.raises(DataError, match="knowledge: got no texts"):
        knowledge_of([]).calibration(read, max_length=3)


def test_one_set_is_itself_and_several_are_pooled() -> None:
    assert joined_knowledge([TEXTS]) is TEXTS
    joined = joined_knowledge([TEXTS, PAIRS])
    assert joined.sequences == TEXTS.sequences + PAIRS.sequences
    assert joined.prompts == (0, 0, 0, 2, 1)
    assert joined.sets == (3, 2)
    assert joined.learned_tokens == (2 + 1 + 3) + (2 + 2)
    texts = joined_knowledge([TEXTS, TEXTS])
    assert texts.learned is None
    assert texts.fingerprint == Calibration(TEXTS.sequences * 2, 0).fingerprint


def test_the_first_examples_of_each_set() -> None:
    joined = joined_knowledge([TEXTS, PAIRS])
    assert joined.first(1) == Calibration.of_answers((TEXTS.sequences[0], PAIRS.sequences[0]), 0, (0, 2), sets=(1, 1))
    assert joined.first(2).sets == (2, 2)
    assert joined.first(9) == joined
    assert PAIRS.first(1) == Calibration.of_answers(PAIRS.sequences[:1], 0, (2,))
    turned = joined_knowledge([PAIRS, TEXTS])
    assert turned.fingerprint == joined.fingerprint
    assert turned.first(1).fingerprint == joined.first(1).fingerprint
    assert joined_knowledge([Calibration(TEXTS.sequences[::-1], 0), PAIRS]).first(1).fingerprint != (
        joined.first(1).fingerprint
    )
    labelled = Calibration(TEXTS.sequences, 0, labels=(0, 1, 2), types=((0, 0, 1), (0, 1), (0, 0, 1, 1)))
    assert labelled.first(2) == Calibration(TEXTS.sequences[:2], 0, labels=(0, 1), types=((0, 0, 1), (0, 1)))
    assert labelled.learned_tokens == 3


@pytest.mark.parametrize("data", [TEXTS, PAIRS, joined_knowledge([TEXTS, PAIRS])], ids=["texts", "pairs", "both"])
def test_the_count_of_learned_tokens_is_that_of_the_loss(data: Calibration) -> None:
    count: Any = 0
    for batch in data.batches(8):
        whole = batch.attention_mask if batch.loss_mask is None else batch.loss_mask
        count += int((whole[:, 1:].bool() & batch.attention_mask[:, :-1].bool()).sum())
    assert data.learned_tokens == count


def test_fingerprints_are_those_of_earlier_versions() -> None:
    """Stores that users have filled stay warm."""
    assert calibration().fingerprint == "fea3055ab9f43a457c8ac4db28fe51b7cb7592bc3fb0c4878ef2ea928f3f9c77"
    assert task().fingerprint == "c99a1332e6b879d7482e400f7c2f8e629b6b2e144980a429d593d7127ccf24a8"
