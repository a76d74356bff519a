"""STM: which tokens are masked, against the base's answers one text at a time; and training on what is left."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from tests.training.support import EXAMPLES, MODEL, TOKENIZER

from keeptune.core.artefact import read_json, write_json
from keeptune.core.errors import DataError
from keeptune.model.pretrained import load_model
from keeptune.training.stm import stm


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(MODEL)


@pytest.fixture(scope="module")
def data() -> Dataset:
    dataset, _ = EXAMPLES.dataset(TOKENIZER, 64)
    told = [
        TOKENIZER("Once upon a time there was a" + rest)["input_ids"] for rest in (" little girl", " dog named Tim.")
    ]
    return Dataset.from_dict(
        {
            "input_ids": [*dataset["input_ids"], *told],
            "labels": [*dataset["labels"], *([-100, *ids[1:]] for ids in told)],
        }
    )


def perplexities(model: Any, ids: list[int]) -> list[float]:
    """The base's, a text at a time."""
    with torch.no_grad():
        rows = model(input_ids=torch.tensor([ids])).logits[0].double().softmax(-1)
    return [1.0] + [float(1 / rows[place - 1, ids[place]]) for place in range(1, len(ids))]


@pytest.mark.parametrize("threshold", [1.5, 2.5, 100.0])
def test_tokens_above_the_threshold_are_not_learned(threshold: float, model: Any, data: Dataset) -> None:
    found = stm(model, data, threshold)
    assert found["input_ids"] == data["input_ids"]
    masked = 0
    for ids, before, after in zip(data["input_ids"], data["labels"], found["labels"], strict=True):
        wanted = [
            -100 if value > threshold else label for label, value in zip(before, perplexities(model, ids), strict=True)
        ]
        assert after == wanted
        masked += sum(a != b for a, b in zip(before, after, strict=True))
    assert 0 < masked < sum(label != -100 for labels in data["labels"] for label in labels)


def test_at_infinity_all_is_learned(model: Any, data: Dataset) -> None:
    assert stm(model, data, math.inf)["labels"] == data["labels"]


def test_a_text_does_not_depend_on_the_others(model: Any, data: Dataset) -> None:
    alone = stm(model, data.select([9]), 2.5)
    assert alone["labels"][0] == stm(model, data, 2.5)["labels"][9]


def test_what_was_found_is_kept(model: Any, data: Dataset, tmp_path: Path) -> None:
    """A killed run goes on with the same mask, without another pass."""
    kept = tmp_path / "stm.json"
    found = stm(model, data, 2.5, kept=kept)
    record = read_json(kept)
    assert record["threshold"] == 2.5
    assert record["masked"] == sum(map(len, record["places"]))
    assert stm(None, data, 2.5, kept=kept)["labels"] == found["labels"]
    write_json(kept, record | {"places": [[] for _ in data]})
    assert stm(None, data, 2.5, kept=kept)["labels"] == data["labels"], "the file is what is read"


def test_a_threshold_below_every_token_is_refused(model: Any, data: Dataset) -> None:
    with pytest.raises(
        DataError, match=r"task\.stm_threshold: got 1, below the perplexity of all \d+ tokens.*Raise it"
    ):
        stm(model, data.select(range(8)), 1.0)


def test_texts_beyond_the_positions_are_refused(model: Any) -> None:
    long = Dataset.from_dict({"input_ids": [[1] * 600], "labels": [[1] * 600]})
    with pytest.raises(DataError, match=r"a text of 600 tokens, wanted at most 512.*packing_strategy bfd"):
        stm(model, long)
