from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from keeptune.core.errors import DataError, RecipeError
from keeptune.evaluation.scored_tokens import Encoder, ScoredTokens, context_limit, in_batches, padded


def _of(length: int) -> ScoredTokens:
    return ScoredTokens(tuple(range(1, length + 1)), 1, False)


@settings(deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.integers(1, 7))
def test_batches_hold_every_sequence_once(lengths: list[int], rows: int) -> None:
    seen: list[int] = []

    def compute(batch: Sequence[ScoredTokens]) -> list[list[int]]:
        ids, mask = padded(batch, pad=0)
        assert len(batch) <= rows
        assert mask.dtype == ids.dtype == torch.long
        assert mask[:, 0].all()
        seen.extend(mask.sum(dim=1).tolist())
        return [row[own.bool()].tolist() for row, own in zip(ids, mask, strict=True)]

    sequences = [_of(length) for length in lengths]
    assert in_batches(sequences, lambda tokens: len(tokens.ids), rows, compute) == [list(s.ids) for s in sequences]
    assert seen == sorted(lengths, reverse=True)


@pytest.mark.parametrize(("vocabulary", "wanted"), [(2**17, [2, 2, 1]), (1, [5]), (2**30, [1] * 5)])
def test_batches_bound_the_logits(vocabulary: int, wanted: list[int]) -> None:
    sizes: list[int] = []

    def compute(batch: Sequence[ScoredTokens]) -> list[int]:
        sizes.append(len(batch))
        return [0] * len(batch)

    in_batches([_of(1000)] * 5, lambda tokens: len(tokens.ids), 64, compute, lambda own: len(own) * 1000 * vocabulary)
    assert sizes == wanted


def test_document_is_cut_at_the_end(tokenizer: Any) -> None:
    ids = tokenizer("Once upon a time there was a cat.")["input_ids"]
    cut = Encoder(tokenizer, 4).document("Once upon a time there was a cat.", "x")
    assert list(cut.ids) == ids[:4]
    assert (cut.start, cut.cut) == (1, True)
    assert not Encoder(tokenizer, len(ids)).document("Once upon a time there was a cat.", "x").cut


def test_prompt_is_cut_at_the_front_and_keeps_the_start_token(tokenizer: Any) -> None:
    ids = tokenizer("Once upon a time there was a cat.")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    cut = Encoder(tokenizer, 4).prompt("Once upon a time there was a cat.", "x")
    assert list(cut.ids) == [ids[0], *ids[-3:]]
    assert (cut.start, cut.cut) == (4, True)


def test_choice_has_exactly_one_space(tokenizer: Any) -> None:
    plain = Encoder(tokenizer, 99).choice("The cat is", "red", "x")
    assert plain == Encoder(tokenizer, 99).choice("The cat is  ", " red ", "x")
    assert tokenizer.decode(list(plain.ids[plain.start :])).strip() == "red"
    assert list(plain.ids) == tokenizer("The cat is red")["input_ids"]


def test_cut_choice_scores_the_same_tokens(tokenizer: Any) -> None:
    whole = Encoder(tokenizer, 99).choice("There was a cat and the cat is", "red", "x")
    cut = Encoder(tokenizer, 8).choice("There was a cat and the cat is", "red", "x")
    assert cut.cut and len(cut.ids) == 8
    assert cut.ids[cut.start :] == whole.ids[whole.start :]


def test_an_end_token_that_the_tokenizer_adds_is_dropped_from_prompts() -> None:
    class Ending:
        eos_token_id, bos_token_id = 2, None

        def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
            return {"input_ids": [10 + len(word) for word in text.split()] + [2]}

    tokenizer: Any = Ending()
    assert Encoder(tokenizer, 9).prompt("a bb", "x").ids == (11, 12)
    found = Encoder(tokenizer, 9).choice("a bb", "ccc", "x")
    assert (found.ids, found.start) == ((11, 12, 13), 2)
    assert Encoder(tokenizer, 9).document("a bb", "x").ids == (11, 12, 2)


def test_nothing_to_score_is_an_error(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="place: got a document of 1 token"):
        Encoder(tokenizer, 9).document("", "place")
    with pytest.raises(DataError, match="place: got the choice"):
        Encoder(tokenizer, 12).choice("The cat is", "red " * 20, "place")


def test_context_limit() -> None:
    assert context_limit(1024, 32, None, where="x") == 1024
    assert context_limit(1024, 32, 512, where="x") == 480
    assert context_limit(100, 32, 512, where="x") == 100
    with pytest.raises(RecipeError, match=r"x\.max_new_tokens"):
        context_limit(100, 511, 512, where="x")
