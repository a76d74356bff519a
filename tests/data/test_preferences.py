"""Judged answers: what rows may look like, which of them teach, and what statistics see."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from tests.assets import STORIES

from keeptune.core.errors import DataError
from keeptune.data.examples import data_account
from keeptune.data.preferences import Preferences, preferences
from keeptune.model.pretrained import load_tokenizer

TOKENIZER = load_tokenizer(str(STORIES))
USER, GOOD, BAD = {"role": "user", "content": "Hi?"}, *({"role": "assistant", "content": c} for c in ("Hello!", "No."))

SAID, TOLD = {"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Hello!"}  # ShareGPT's names


def pairs(*rows: dict[str, Any], prompt: str | None = None) -> Preferences:
    return preferences(rows, prompt=prompt, answers=("{chosen}", "{rejected}"), where="task.train")


def single(*rows: dict[str, Any], prompt: str | None = None) -> Preferences:
    return preferences(rows, prompt=prompt, answers=("{completion}",), label="{label}", where="task.train")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "Hi?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "Hi?", "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": json.dumps([SAID, TOLD]), "rejected": [SAID, {"from": "gpt", "value": "No."}]},
        {"prompt": [USER], "chosen": "Hello!", "rejected": "No."},
    ],
)
def test_conversations_are_read_in_every_form_that_people_have(row: dict[str, Any]) -> None:
    assert pairs(row) == Preferences(((USER,),), (((GOOD,), (BAD,)),))


def test_texts_without_a_prompt_begin_with_it() -> None:
    found = pairs({"chosen": "Human: Hi?\nAssistant: Hello", "rejected": "Human: Hi?\nAssistant: No"})
    assert found.prompts == ("Human: Hi?\nAssistant:",) and found.answers == ((" Hello", " No"),)
    named = preferences([{"q": "2+2?", "a": "4", "b": "5"}], prompt="Q: {q} ", answers=("{a}", "{b}"), where="x")
    assert named == Preferences(("Q: 2+2? ",), (("4", "5"),), where="x")


def test_single_answers_may_be_whole_conversations() -> None:
    found = single({"completion": [USER, GOOD], "label": True}, {"prompt": "Hi?", "completion": [BAD], "label": False})
    assert found == Preferences(((USER,), (USER,)), (((GOOD,),), ((BAD,),)), (True, False))


def test_equal_answers_are_counted_and_left_out(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": r} for r in ("b", "c", "b")]
    assert pairs(*rows).answers == (("b", "c"),)
    assert "2 of 3 pairs have equal answers and are left out (rows 1, 3)" in caplog.text


PAIR = {"prompt": "a", "chosen": "b", "rejected": "c"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([PAIR | {"rejected": "b"}] * 2, "2 rows, all with equal answers"),
        ([{"prompt": "a", "chosen": "b", "worse": "c"}], "got fields prompt, chosen, worse"),
        ([PAIR, PAIR | {"chosen": None}], "task.train row 2: got null"),
        ([PAIR | {"chosen": ["b"]}], "wanted an object with role and content"),
        ([PAIR | {"chosen": ""}], "task.train row 1: got an empty answer"),
        ([PAIR | {"prompt": ""}], "got no prompt"),
        ([{"chosen": "x", "rejected": "y"}], "got no prompt"),
        ([{"prompt": "a", "completion": "b", "label": True}] * 2, "2 rows, all labelled true"),
        ([{"prompt": "a", "completion": "b", "label": 1}], "row 1, label: got 1, wanted true for a good answer"),
        ([{"prompt": "a", "completion": "b", "label": "true"}], "got 'true'"),
        ([{"prompt": [USER], "chosen": [USER], "rejected": [BAD]}], "row 1: got an answer that begins with user"),
        ([{"completion": "b", "label": True}], "got no prompt"),
    ],
)
def test_wrong_rows_are_named(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(DataError) as error:
        (single if "label" in rows[0] else pairs)(*rows)
    assert message in str(error.value)


def test_statistics_see_chosen_and_good_answers_only() -> None:
    one = pairs(PAIR, PAIR | {"prompt": "one two three"}).calibration(TOKENIZER, max_length=32)
    assert len(one.sequences) == 2
    two = single(PAIR | {"completion": "b", "label": True}, PAIR | {"completion": "c", "label": False})
    assert two.calibration(TOKENIZER, max_length=32).sequences == (two.tokens(TOKENIZER, 0)[0].ids,)
    account = data_account(two, TOKENIZER, 32)[0]  # training looks at bad ones too
    assert (account["kept"], account["lost"]) == (2, {})


@pytest.mark.parametrize(("truncate", "left"), [("right", [0, 1]), ("drop", [0])])
def test_pairs_that_are_too_long_are_counted(truncate: Any, left: list[int]) -> None:
    rows = [PAIR, PAIR | {"rejected": "c" * 40}, PAIR | {"prompt": "one two three " * 9}]
    found = pairs(*rows)
    short = Preferences(found.prompts, found.answers, truncate=truncate)
    data, lost = short.dataset(TOKENIZER, 16)
    assert data["row"] == left
    assert len(short.fitted(TOKENIZER, 16)[0]) == len(left)
    assert sorted(number for numbers in lost.values() for number in numbers) == [2, 3]


def test_messages_need_a_chat_template() -> None:
    with pytest.raises(DataError, match="row 1: got messages that the chat template does not take .*division by zero"):
        chosen = pairs({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]})
        replace(chosen, template={"chat_template": "{{ 1 / 0 }}"}).tokens(TOKENIZER, 0)
    with pytest.raises(DataError, match="task.train row 1: got messages that the chat template does not take"):
        pairs({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}).tokens(TOKENIZER, 0)
