"""Questions with choices: LoKI's prompt, the right letter, and rows by subject."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from tests.assets import DATA
from tests.data.test_calibration import words
from tokenizers.processors import TemplateProcessing

from keeptune.core.errors import DataError, RecipeError
from keeptune.data.completions import TaskExamples, knowledge_set
from keeptune.data.labelled import LOKI_PROMPT, choose_rows, lettered_rows
from keeptune.data.sources import read_jsonl
from keeptune.recipe.sections import Knowledge

MMLU = DATA / "mmlu" / "test_3_per_subject.jsonl"
ROW = {"subject": "high_school_physics", "question": "How fast?", "choices": ["1", "2", "B", "4"], "answer": "C"}


def test_the_prompt_is_the_papers() -> None:
    (row,) = lettered_rows([ROW], "{choices}", where="knowledge")
    made = knowledge_set([row], prompt=LOKI_PROMPT, completion="{letter}", where="knowledge")
    assert made.read_texts == [
        "There is a single choice question about High School Physics. Answer the question by replying A, B, C or D.\n"
        "Question: How fast?\nChoices:\nA. 1\nB. 2\nC. B\nD. 4\nAnswer: \nC"
    ]


@pytest.mark.parametrize(("answer", "letter"), [("C", "C"), (0, "A"), ("B", "B"), ("4", "D"), (3, "D")])
def test_the_right_letter(answer: Any, letter: str) -> None:
    (row,) = lettered_rows([ROW | {"answer": answer}], "{choices}", where="knowledge")
    assert row["letter"] == letter


@pytest.mark.parametrize(
    "change", [{"answer": "E"}, {"answer": 4}, {"answer": -1}, {"answer": True}, {"choices": "ABCD"}]
)
def test_rows_that_do_not_fit_are_named(change: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="knowledge row 2 (answer|choices)"):
        lettered_rows([ROW, ROW | change], "{choices}", where="knowledge")


def test_rows_by_subject() -> None:
    rows = [{"subject": "ab"[n % 2], "n": n} for n in range(20)]
    first = choose_rows(rows, 3, by="subject", seed=None, where="x")
    assert [row["n"] for row in first] == [0, 1, 2, 3, 4, 5]
    drawn = choose_rows(rows, 3, by="subject", seed=1, where="x")
    assert Counter(row["subject"] for row in drawn) == {"a": 3, "b": 3}
    assert drawn == sorted(drawn, key=lambda row: row["n"]) != first
    assert (
        drawn
        == choose_rows(rows, 3, by="subject", seed=1, where="x")
        != choose_rows(rows, 3, by="subject", seed=2, where="x")
    )
    assert choose_rows(rows, 3, by=None, seed=0, where="x") != rows[:3]
    more = choose_rows(rows, 4, by="subject", seed=1, where="x")
    assert all(row in more for row in drawn) and len(more) == 8
    assert choose_rows(rows, 30, by=None, seed=5, where="x") == rows
    assert choose_rows(rows, 2, by=None, seed=None, where="x") == rows[:2]
    with pytest.raises(DataError, match='x row 1: .*"topic"'):
        choose_rows(rows, 2, by="topic", seed=0, where="x")


def test_mmlu_is_read_as_it_is() -> None:
    rows = read_jsonl(MMLU, where="knowledge.file")
    kept = choose_rows(rows, 2, by="subject", seed=0, where="knowledge")
    assert len(kept) == 57 * 2
    assert all(row["letter"] == row["answer"] for row in lettered_rows(kept, "{choices}", where="knowledge"))


def test_choices_alone_take_the_papers_prompt() -> None:
    made = Knowledge.model_validate({"file": "x", "choices": "{choices}"})
    assert (made.prompt, made.completion, made.chat) == (LOKI_PROMPT, "{letter}", True)
    own = Knowledge.model_validate(
        {"file": "x", "choices": "{choices}", "prompt": "{options}", "completion": " {letter}"}
    )
    assert (own.prompt, own.chat) == ("{options}", False)
    assert not Knowledge.model_validate({"file": "x", "choices": "{choices}", "chat": False}).chat
    with pytest.raises(RecipeError, match=r"knowledge\.chat"):
        Knowledge.model_validate({"file": "x", "chat": True})


@pytest.mark.parametrize("begins", [False, True])
def test_a_chats_user_says_the_prompt(begins: bool, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = words()
    data = TaskExamples(("a b",), (" d",), end=False, chat=True)
    plain = data.calibration(tokenizer, max_length=9)
    assert plain.sequences == (tuple(tokenizer("a b d")["input_ids"]),)
    turns = "{% for m in messages %} c {{ m.content }}{% endfor %}"
    tokenizer.chat_template = "{{ bos_token }}" + turns + "{% if add_generation_prompt %} a{% endif %}"
    tokenizer.bos_token = "b"
    if begins:
        special = [("b", tokenizer.bos_token_id)]
        tokenizer._tokenizer.post_processor = TemplateProcessing(single="b $A", special_tokens=special)
    found = data.calibration(tokenizer, max_length=9)
    assert tokenizer.convert_ids_to_tokens(found.sequences[0]) == ["b", "c", "a", "b", "a", "d"]
    assert found.prompts == (5,)
