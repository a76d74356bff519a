from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from keeptune.core.errors import DataError
from keeptune.data.calibration import Batch, Calibration, tokenize_calibration

PAD = 0
quick = settings(max_examples=60, deadline=None, derandomize=True)
sequences = st.lists(
    st.lists(st.integers(0, 9), min_size=1, max_size=12).map(tuple), min_size=1, max_size=12
)  # the padding id occurs as a real token too
sides = st.sampled_from(["right", "left"])


def unpadded(batch: Batch) -> list[tuple[int, ...]]:
    rows = zip(batch.input_ids, batch.attention_mask, strict=True)
    return [tuple(ids[mask.bool()].tolist()) for ids, mask in rows]


@quick
@given(sequences, st.integers(1, 40), sides)
def test_every_text_is_in_exactly_one_batch(rows: list[tuple[int, ...]], size: int, side: str) -> None:
    data = Calibration(tuple(rows), PAD)
    batches = data.batches(size, padding_side=side)
    assert Counter(row for batch in batches for row in unpadded(batch)) == Counter(rows)
    assert sum(int(batch.attention_mask.sum()) for batch in batches) == data.tokens


@quick
@given(sequences, st.integers(1, 40))
def test_a_batch_is_within_its_size_unless_it_is_one_text(rows: list[tuple[int, ...]], size: int) -> None:
    for batch in Calibration(tuple(rows), PAD).batches(size):
        assert batch.input_ids.numel() <= size or len(batch.input_ids) == 1
        assert batch.input_ids.shape == batch.attention_mask.shape


@quick
@given(sequences, st.integers(1, 40), sides)
def test_padding_is_on_its_side_and_holds_the_padding_id(rows: list[tuple[int, ...]], size: int, side: str) -> None:
    for batch in Calibration(tuple(rows), PAD).batches(size, padding_side=side):
        steps = batch.attention_mask.diff(dim=1)
        assert (steps <= 0).all() if side == "right" else (steps >= 0).all()
        assert (batch.input_ids[batch.attention_mask == 0] == PAD).all()
        assert batch.attention_mask.sum(1).max() == batch.input_ids.shape[1]


@quick
@given(sequences, st.randoms(use_true_random=False), st.integers(1, 40))
def test_batches_and_fingerprint_do_not_depend_on_order(rows: list[tuple[int, ...]], shuffle: Any, size: int) -> None:
    other = list(rows)
    shuffle.shuffle(other)
    a, b = Calibration(tuple(rows), PAD), Calibration(tuple(other), PAD)
    assert a.fingerprint == b.fingerprint
    for x, y in zip(a.batches(size), b.batches(size), strict=True):
        assert torch.equal(x.input_ids, y.input_ids)
        assert torch.equal(x.attention_mask, y.attention_mask)


def test_longest_texts_come_first() -> None:
    batches = Calibration(((1,), (2, 3, 4), (5, 6)), PAD).batches(3)
    assert [unpadded(batch) for batch in batches] == [[(2, 3, 4)], [(5, 6)], [(1,)]]


def test_the_fingerprint_tells_apart_tokens_and_how_they_are_cut() -> None:
    data = [((1, 2, 3),), ((1, 2), (3,)), ((1, 2, 4),), ((1, 2, 3), (1, 2, 3))]
    assert len({Calibration(rows, PAD).fingerprint for rows in data}) == len(data)


# tokenize_calibration


def words(pad: str | None = "<pad>") -> PreTrainedTokenizerFast:
    """A tokenizer with one token a word."""
    vocabulary = {"<pad>": 0, "<unk>": 1, "a": 2, "b": 3, "c": 4, "d": 5}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token=pad, unk_token="<unk>")


def tokenized(texts: Sequence[str], length: int = 9, **extra: Any) -> Calibration:
    return tokenize_calibration(texts, words(**extra), max_length=length, where="knowledge")


def test_texts_become_their_tokens_in_order() -> None:
    found = tokenized(["a b", "c d a", "zzz"])
    assert found == Calibration(((2, 3), (4, 5, 2), (1,)), pad_id=0)
    assert found.tokens == 6


def test_longer_texts_are_cut() -> None:
    assert tokenized(["a b c d", "a"], length=3).sequences == ((2, 3, 4), (2,))


def test_a_tokenizer_without_padding_pads_with_zero() -> None:
    assert tokenized(["a"], pad=None).pad_id == 0


@pytest.mark.parametrize("text", ["", "  \n"], ids=["empty", "blank"])
def test_a_text_without_tokens_is_named(text: str) -> None:
    with pytest.raises(DataError, match="knowledge example 2: got an empty text"):
        tokenized(["a", text])


def test_no_texts_are_refused() -> None:
    with pytest.raises(DataError, match="knowledge: got no texts"):
        tokenized([])
