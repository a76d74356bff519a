"""Labels, scores and pairs of texts from rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from examples.encoder import make_encoder
from transformers import PreTrainedTokenizerBase

from keeptune.core.errors import DataError
from keeptune.data.labelled import (
    LabelledExamples,
    Texts,
    collator,
    labelled_examples,
)
from keeptune.model.pretrained import load_tokenizer

ROWS: list[dict[str, Any]] = [
    {"a": "The sea is blue.", "b": "Water.", "label": "nature", "score": 3},
    {"a": "A tax was raised.", "b": "Money is short now.", "label": "politics", "score": "4.5"},
    {"a": "Trees grow.", "b": "They do, slowly.", "label": " nature ", "score": 0.25},
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("encoder")
    make_encoder(folder, [row[key] for row in ROWS for key in "ab"] * 3)
    return load_tokenizer(str(folder))


def read(rows: list[dict[str, Any]], **options: Any) -> LabelledExamples:
    return labelled_examples(rows, **{"text": "{a}", "text_pair": None, "label": "{label}", "where": "w"} | options)


def test_labels_are_collected_sorted_or_taken_as_given() -> None:
    assert (read(ROWS).names, read(ROWS).labels) == (("nature", "politics"), (0, 1, 0))
    made = read(ROWS, names=["politics", "sport", "nature"])
    assert (made.names, made.labels) == (("politics", "sport", "nature"), (2, 0, 2))
    assert read([{"a": "x", "label": 1}, {"a": "y", "label": 0}]).names == ("0", "1")


def test_scores_are_numbers() -> None:
    made = labelled_examples(ROWS, text="{a}", text_pair="{b}", label="{score}", scores=True, where="w")
    assert (made.labels, made.names) == ((3.0, 4.5, 0.25), ())
    assert made.texts == Texts(tuple(row["a"] for row in ROWS), tuple(row["b"] for row in ROWS))


@pytest.mark.parametrize(
    ("row", "options", "message"),
    [
        ({"a": "x"}, {}, r'w row 4: .*the field "label"'),
        ({"a": "x", "label": None}, {}, "w row 4, label: got null"),
        ({"a": "x", "label": " "}, {}, "w row 4: got an empty label"),
        ({"a": "x", "label": ["nature"]}, {}, "w row 4, label: got a list"),
        ({"a": " ", "label": "nature"}, {}, "w row 4: got an empty text"),
        (
            {"a": "x", "label": "sport"},
            {"names": ["nature", "politics"]},
            'row 4: got "sport".*nature, pol',
        ),
    ],
)
def test_rows_that_do_not_fit_are_named(row: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read([*ROWS, row], **options)


@pytest.mark.parametrize("score", ["high", None, True, "nan", "", [3], 10**400])
def test_a_score_that_is_no_number_is_named(score: Any) -> None:
    with pytest.raises(DataError, match=r"w row 2: got the score .*kind: classification"):
        read([{"a": "x", "s": 1}, {"a": "x", "s": score}], label="{s}", scores=True)


def test_one_label_alone_cannot_be_told_apart() -> None:
    with pytest.raises(DataError, match='one label only, "nature".*kind: regression'):
        read([ROWS[0], ROWS[2]])


def test_what_is_learned_is_part_of_the_key() -> None:
    keys = {read(rows).fingerprint for rows in (ROWS, ROWS[::-1], [ROWS[0] | {"label": "politics"}, *ROWS[1:]])}
    keys |= {read(ROWS, names=["politics", "nature"]).fingerprint, read(ROWS, text_pair="{b}").fingerprint}
    assert len(keys) == 5


def test_texts_are_read_as_the_tokenizer_joins_and_cuts_them(tokenizer: PreTrainedTokenizerBase) -> None:
    texts = read(ROWS, text_pair="{b}").texts
    (whole, none), (short, cut) = texts.encode(tokenizer, 64), texts.encode(tokenizer, 9)
    for index, row in enumerate(ROWS):
        assert whole["input_ids"][index] == tokenizer(row["a"], row["b"])["input_ids"]
    assert (none, max(map(len, short["input_ids"]))) == ((), 9)
    assert len(cut) == sum(len(ids) > 9 for ids in whole["input_ids"]) > 0


def test_a_batch_is_padded_behind_whatever_the_tokenizer_says(tokenizer: PreTrainedTokenizerBase) -> None:
    encoded, _ = read(ROWS).texts.encode(tokenizer, 64)
    tokenizer.padding_side = "left"
    try:
        batch = collator(tokenizer)(encoded.to_list())
        assert tokenizer.padding_side == "left"
    finally:
        tokenizer.padding_side = "right"
    assert bool((batch["input_ids"][:, 0] == tokenizer.bos_token_id).all())
    assert batch["attention_mask"].sum(1).tolist() == [len(ids) for ids in encoded["input_ids"]]


def test_a_sample_has_the_tokens_and_labels_of_the_drawn_examples(tokenizer: PreTrainedTokenizerBase) -> None:
    task = read(ROWS, text_pair="{b}")
    made = task.calibration(tokenizer, max_length=64, examples=2, seed=1)
    ids = list(task.texts.encode(tokenizer, 64)[0]["input_ids"])
    assert made.labels is not None
    assert len(made.labels) == 2
    for sequence, label in zip(made.sequences, made.labels, strict=True):
        assert task.labels[ids.index(list(sequence))] == label
    (batch,) = made.batches()
    assert batch.labels is not None
    assert batch.loss_mask is None
    assert sorted(batch.labels.tolist()) == sorted(made.labels)
    assert batch.labels.dtype == torch.long


def test_an_item_overlaps_an_equal_text_only() -> None:
    whole = Texts(("Trees", "Trees grow."), ("x", "y")).whole
    assert not whole[1].startswith(whole[0])
    assert len({*whole, *Texts(("Trees", "Trees grow.")).whole}) == 4
