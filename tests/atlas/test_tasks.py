"""The three tasks for continual learning are what SOURCE.md says: new to atlas, disjoint, and right."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from tests.assets import DATA

from keeptune.atlas import data_path, model_path
from studies.atlas.facts import choose_facts, divide, read_facts
from studies.atlas.score import exact_match, fact_pairs, read_rows
from studies.atlas.tasks import FILES, lesson_rows

RELATIONS = DATA / "relations" / "relations.jsonl"
TASKS = ("problems", "ships", "formats")
OLDER = ("calibration", "facts", "statements", "topics.test", "topics.train")


def rows(name: str) -> list[dict[str, str]]:
    return read_rows(data_path(f"{name}.jsonl"))


def both(task: str) -> list[dict[str, str]]:
    return rows(f"{task}.train") + rows(f"{task}.test")


@pytest.fixture(scope="module")
def base() -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(model_path()).eval(), AutoTokenizer.from_pretrained(model_path())


def test_the_files_are_what_the_script_writes() -> None:
    for name, made in lesson_rows(RELATIONS, 7).items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made)
        assert data_path(name).read_text(encoding="utf-8") == text, name
    assert sum(data_path(name).stat().st_size for name in FILES) < 500_000


@pytest.mark.parametrize("task", TASKS)
def test_the_base_cannot_do_it(task: str, base: tuple[Any, Any]) -> None:
    assert exact_match(*base, fact_pairs(data_path(f"{task}.test.jsonl"))[:100]) <= 0.02


@pytest.mark.parametrize("task", TASKS)
def test_no_question_is_asked_twice(task: str) -> None:
    questions = [row["question"] for row in both(task)]
    assert len(set(questions)) == len(questions)


@pytest.mark.parametrize("task", TASKS)
def test_tokens_of_a_prompt_begin_those_of_prompt_and_answer(task: str, base: tuple[Any, Any]) -> None:
    tokenizer = base[1]
    for prompt, answer in fact_pairs(data_path(f"{task}.test.jsonl")):
        short, full = tokenizer(prompt)["input_ids"], tokenizer(f"{prompt} {answer}")["input_ids"]
        assert full[: len(short)] == short
        assert len(full) < 128
        assert len(full) - len(short) < 32


def test_every_sum_is_right_and_no_name_is_in_both_parts() -> None:
    for row in both("problems"):
        a, b = map(int, re.findall(r"\d", row["question"]))
        assert row["answer"] == str(a + b if row["kind"] == "+" else a - b)
        assert ("loses" in row["question"]) == (row["kind"] == "-")
    train, test = ({row["question"].split()[0] for row in rows(f"problems.{part}")} for part in ("train", "test"))
    assert not train & test
    assert {row["kind"] for row in rows("problems.test")} == {"+", "-"}


def test_each_new_fact_has_one_answer_and_is_tested_in_a_wording_that_was_not_trained() -> None:
    answers: dict[tuple[str, str], set[str]] = {}
    for row in both("ships"):
        answers.setdefault((row["subject"], row["relation"]), set()).add(row["answer"])
    assert all(len(found) == 1 for found in answers.values())
    taught = {(row["subject"], row["relation"]) for row in rows("ships.train")}
    assert taught == {(row["subject"], row["relation"]) for row in rows("ships.test")} == set(answers)
    assert not {row["question"] for row in rows("ships.train")} & {row["question"] for row in rows("ships.test")}
    wordings = {row["question"].replace(row["subject"], "S") for row in rows("ships.train")}
    assert wordings == {row["question"].replace(row["subject"], "S") for row in rows("ships.test")}


def test_no_ship_is_named_in_the_relations_data() -> None:
    text = RELATIONS.read_text(encoding="utf-8").lower()
    assert not [row["subject"] for row in both("ships") if f'"{row["subject"].lower()}"' in text]


def test_formats_ask_known_facts_that_no_other_file_has() -> None:
    train, test = ({row["subject"] for row in rows(f"formats.{part}")} for part in ("train", "test"))
    others = {row["subject"] for name in OLDER for row in rows(name)}
    assert not train & test
    assert not (train | test) & others
    chosen = choose_facts(read_facts(RELATIONS), 7)
    left = {fact.question: fact.answer for fact in chosen}
    assert {fact.subject for group in divide(chosen, 7).values() for fact in group} >= others
    forms = {"sentence": "{} is the answer.", "twice": "{0}, {0}", "emphasis": "{}!"}
    for row in both("formats"):
        question, _, wish = row["question"].rpartition(" Reply ")
        assert row["answer"] == forms[row["format"]].format(left[question])
        assert wish.rstrip(".").split()[-1] == row["format"]
