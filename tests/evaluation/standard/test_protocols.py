"""How papers score, by hand; and the instruction form of LLM-Adapters against its own rows."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.assets import DATA

from keeptune.evaluation.standard.entry import NAMES
from keeptune.evaluation.standard.local_data import local_rows
from keeptune.evaluation.standard.protocols import (
    PROTOCOLS,
    adapters_answer,
    adapters_instruction,
    metamath_gold,
    metamath_number,
)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("6 + 2 = 8. The answer is: 8", 8),
        ("The answer is: 8.", 8),
        ("The answer is: $18 per day", 18),
        ("The answer is: 1,200", 1200),
        ("The answer is: 1,234,567", 1234),  # one separator, as in the scripts
        ("The answer is: 2.5", 2),  # Python rounds to even, and so do they
        ("The answer is: 3.5", 4),
        ("The answer is: -4", -4),
        ("The answer is: 7/2", 4),
        ("The answer is: 9/0", 9),
        ("The answer is: /2", None),
        ("The answer is: 3. The answer is: 5", 5),
        ("the answer is: 8", None),
        ("The answer is 8", None),
        ("The answer is:8", None),
        ("#### 8", None),
        ("The answer is: eight", None),
        ("", None),
    ],
)
def test_only_what_follows_the_phrase_counts(text: str, number: int | None) -> None:
    assert metamath_number(text) == number


def test_right_numbers_of_gsm8k() -> None:
    assert metamath_gold("2 + 3 = <<2+3=5>>5\n#### 5") == 5
    assert metamath_gold("#### 1,234") == 1234
    assert metamath_gold("#### -3") == -3


def test_gsm8k_by_metamath() -> None:
    right = PROTOCOLS["metamath", "gsm8k"].right
    assert right is not None
    row = {"question": "?", "answer": "x\n#### 5"}
    assert [right(row, text) for text in ("The answer is: 5", "The answer is: 6", "#### 5", "")] == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("text", "gold", "score"),
    [
        ("so. The answer is: 2", "2", 1),
        ("The answer is: 2.", "2", 1),
        ("The answer is: 2.\nMore text", "2", 1),
        ("The answer is: \\frac12", "\\frac{1}{2}", 1),
        ("The answer is: 0.5", "\\frac{1}{2}", 1),
        ("The answer is: 3", "2", 0),
        ("$2$", "2", 0),
        ("", "2", 0),
    ],
)
def test_math_by_metamath(text: str, gold: str, score: float) -> None:
    pytest.importorskip("lm_eval.tasks.hendrycks_math.utils")
    right = PROTOCOLS["metamath", "math"].right
    assert right is not None
    assert right({"answer": gold}, text) == score


def test_the_prompt_of_metamath() -> None:
    assert PROTOCOLS["metamath", "gsm8k"].prompt({"question": "How many?"}) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nHow many?\n\n### Response: Let's think step by step."
    )


@pytest.mark.parametrize(
    ("name", "split", "file"),
    [
        ("arc_easy", "test", "ARC-Easy.test.jsonl"),
        ("arc_easy", "train", "ARC-Easy.train.jsonl"),
        ("openbookqa", "test", "openbookqa.test.jsonl"),
        ("boolq", "validation", "boolq.test.jsonl"),
    ],
)
def test_instructions_are_those_of_llm_adapters(name: str, split: str, file: str) -> None:
    path = DATA / "commonsense" / file
    raw = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = local_rows(name, split, path, where="x")
    assert [adapters_instruction(name, row) for row in rows] == [(row["instruction"], row["answer"]) for row in raw]


HANDMADE: dict[str, tuple[dict[str, Any], str, str]] = {
    "piqa": (
        {"goal": "Go on.", "sol1": "A", "sol2": "B", "label": 1},
        "Please choose the correct solution to the question: Go on.\n\nSolution1: A\n\nSolution2: B\n\n"
        "Answer format: solution1/solution2",
        "solution2",
    ),
    "winogrande": (
        {"sentence": "Tom saw _ .", "option1": "Ann", "option2": "Bob", "answer": "1"},
        "Please choose the correct answer to fill in the blank to complete the given sentence: Tom saw _ .\n\n"
        "Option1: Ann Option2: Bob Answer format: option1/option2",
        "option1",
    ),
    "hellaswag": (
        {"activity_label": "Travel", "ctx": "A man", "endings": ["a", "b", "c", "d"], "label": "2"},
        "Please choose the correct ending to complete the given sentence: Travel: A man\n\n"
        "Ending1: a Ending2: b Ending3: c Ending4: d\n\nAnswer format: ending1/ending2/ending3/ending4",
        "ending3",
    ),
    "arc_challenge": (
        {"question": "Q?", "choices": {"text": ["a", "b", "c"], "label": ["1", "2", "3"]}, "answerKey": "2"},
        "Please choose the correct answer to the question: Q?\n\nAnswer1: a Answer2: b Answer3: c\n\n"
        "Answer format: answer1/answer2/answer3",
        "answer2",
    ),
}


@pytest.mark.parametrize("name", HANDMADE)
def test_instructions_from_the_fields_of_the_hub(name: str) -> None:
    row, instruction, right = HANDMADE[name]
    assert adapters_instruction(name, row) == (instruction, right)
    protocol = PROTOCOLS["llm-adapters", name]
    assert instruction in protocol.prompt(row)
    assert protocol.right is not None
    assert protocol.right(row, f" the correct answer is {right}") == 1
    assert protocol.right(row, " the correct answer is") == 0


@pytest.mark.parametrize(
    ("name", "text", "word"),
    [
        ("boolq", " the correct answer is true", "true"),
        ("boolq", "false, not true", "false"),
        ("boolq", "True", ""),
        ("piqa", "solution2 or solution1", "solution2"),
        ("openbookqa", "answer5", "answer5"),
        ("openbookqa", "answer 2", ""),
        ("hellaswag", "ending4.", "ending4"),
        ("winogrande", "", ""),
    ],
)
def test_the_first_answer_word_counts(name: str, text: str, word: str) -> None:
    assert adapters_answer(name, text) == word


def test_webqs_by_generation() -> None:
    right = PROTOCOLS["generated", "webqs"].right
    assert right is not None
    row = {"question": "q", "answers": ["Jamaican English", "Patois"]}
    assert [right(row, text) for text in (" the jamaican english", "Patois!", "English", "")] == [1, 1, 0, 0]


def test_prompts_of_bigcode() -> None:
    assert PROTOCOLS["bigcode", "humaneval"].prompt({"prompt": "\ndef f():\n    "}) == "def f():"
    row = {"text": "Add.", "test_list": ["assert f(1) == 2", "assert f(2) == 3"]}
    assert PROTOCOLS["bigcode", "mbpp"].prompt(row) == '"""\nAdd.\nassert f(1) == 2\n"""\n'


def test_every_protocol_of_the_table_is_there() -> None:
    named = {
        (how.protocol, name) for name, row in NAMES.items() for how in row.scorings.values() if how.protocol is not None
    }
    assert named == set(PROTOCOLS)
