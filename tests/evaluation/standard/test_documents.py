"""An evaluation set that was used before is refused, with the rows; one that was not is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.assets import DATA
from tests.evaluation.standard.conftest import local

from keeptune.core.errors import DataError
from keeptune.evaluation.benchmark_data import (
    Corpus,
    Documents,
    _parts,
    data_fingerprint,
    refuse_documents,
    refuse_used,
)
from keeptune.evaluation.benchmark_data import _plain as plain
from keeptune.recipe.schema import make_recipe


def scored(*items: tuple[str, ...]) -> Documents:
    parts = [tuple(plain(part) for part in item) for item in items]
    return Documents("evaluate.x", parts, "key")


def used(*rows: dict[str, Any]) -> list[Corpus]:
    return [Corpus("task.train", rows, [""] * len(rows))]


QUESTION = "What is the capital of the island that lies south of here?"


@pytest.mark.parametrize(
    "row",
    [
        {"question": QUESTION, "answer": "x"},
        {"text": f"Below is an instruction.\n\n### Instruction:\n{QUESTION.upper()}\n\n### Response:"},
        {"text": f"Q: {QUESTION.replace(' ', '  ')}\nA: x"},
        {"messages": [{"role": "user", "content": QUESTION.rstrip("?")}]},
        {"nested": {"deep": [f"Please answer: {QUESTION}"]}},
    ],
)
def test_a_question_is_recognised_in_any_template(row: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"evaluate.x: got 1 of 2 items that are in task.train too \(items 2;"):
        refuse_documents(used({"a": "nothing"}, row), scored(("Who was the first to cross the sea?",), (QUESTION,)))


@pytest.mark.parametrize(
    "row",
    [
        {"question": "What is the capital of the island that lies north of here?"},
        {"question": QUESTION[:30]},
        {"question": QUESTION.replace("south", "far south")},
        {"number": 5},
    ],
)
def test_other_questions_are_left_alone(row: dict[str, Any]) -> None:
    refuse_documents(used(row), scored((QUESTION,)))


def test_a_rendered_text_counts_as_well() -> None:
    corpus = Corpus("knowledge.file", [{"id": 1}], [f"{QUESTION} Answer\0"])
    with pytest.raises(DataError, match=r"knowledge.file"):
        refuse_documents([corpus], scored((QUESTION,)))


def test_a_common_stem_is_no_overlap_without_its_choices() -> None:
    stem = "Which of the following statements is true?"
    item = (stem, "Water is wet", "Fire is cold", "A", "B")
    refuse_documents(used({"question": stem, "choices": ["Ice is warm", "Water is wet"]}), scored(item))
    with pytest.raises(DataError):
        refuse_documents(used({"question": stem, "choices": ["Fire is cold", "Water is wet", "A", "B"]}), scored(item))


def test_short_questions_have_to_stand_by_themselves() -> None:
    item = ("who was he",)
    refuse_documents(used({"text": "I asked who was he talking to"}), scored(item))
    for text in ("Who was he?", "Who was he? Napoleon", "Q: who was he"):
        with pytest.raises(DataError):
            refuse_documents(used({"text": text}), scored(item))


def test_the_first_rows_are_named_and_the_others_counted() -> None:
    items = [(f"{QUESTION} number {index}",) for index in range(8)]
    rows = [{"text": item[0]} for item in items]
    with pytest.raises(DataError, match=r"8 of 8 items.*\(items 1, 2, 3, 4, 5\.\.\.; 'what is the capital"):
        refuse_documents(used(*rows), scored(*items))


def test_empty_texts_overlap_with_nothing() -> None:
    refuse_documents(used({"text": ""}, {}), scored(("",), ()))


@pytest.mark.parametrize("name", ["gsm8k", "nq_open", "mmlu", "arc_easy", "boolq", "humaneval", "tinystories"])
def test_items_of_local_data_are_recognised_in_their_own_file(name: str) -> None:
    more: dict[str, Any] = {"examples": 1} if name == "mmlu" else {"examples": 20}
    benchmark = local(name, shots=0, **more)
    file = {
        "gsm8k": "gsm8k/test.jsonl",
        "nq_open": "nq_open/dev.jsonl",
        "mmlu": "mmlu/test_3_per_subject.jsonl",
        "arc_easy": "commonsense/ARC-Easy.test.jsonl",
        "boolq": "commonsense/boolq.test.jsonl",
        "humaneval": "humaneval/HumanEval.jsonl",
        "tinystories": "tinystories/stories.jsonl",
    }[name]
    rows = [json.loads(line) for line in (DATA / file).read_text("utf-8").split("\n") if line]
    count = 57 if name == "mmlu" else 20
    with pytest.raises(DataError, match=f"{count} of {count} items that are in task.train too"):
        refuse_used([Corpus("task.train", rows, [""] * len(rows))], benchmark)


@pytest.mark.parametrize(
    ("name", "file"),
    [("gsm8k", "gsm8k/train.jsonl"), ("arc_easy", "commonsense/ARC-Easy.train.jsonl"), ("mmlu", "mmlu/dev.jsonl")],
)
def test_training_splits_do_not_overlap(name: str, file: str) -> None:
    benchmark = local(name, shots=0, examples=3 if name == "mmlu" else 40)
    rows = [json.loads(line) for line in (DATA / file).read_text("utf-8").split("\n") if line]
    refuse_used([Corpus("task.train", rows, [""] * len(rows))], benchmark)


def test_a_recipe_that_trains_on_what_it_scores_is_refused(tmp_path: Path) -> None:
    from keeptune.pipeline.job import Job

    lines = (DATA / "gsm8k/test.jsonl").read_text("utf-8").splitlines(keepends=True)[:4]
    (tmp_path / "train.jsonl").write_text("".join(lines[2:3]), "utf-8")
    values = {
        "model": "atlas",
        "method": "lora",
        "task": {"train": str(tmp_path / "train.jsonl"), "prompt": "Solve: {question}\n", "completion": "{answer}"},
        "output": str(tmp_path / "out"),
        "device": "cpu",
        "evaluate": [{"name": "gsm8k", "data": str(DATA / "gsm8k"), "shots": 0, "examples": 4}],
    }
    with pytest.raises(DataError, match=r"evaluate.gsm8k: got 1 of 4 items that are in task.train too \(items 3;"):
        Job(make_recipe(values, folder=tmp_path, where="recipe")).check()
    values["evaluate"][0]["examples"] = 2  # type: ignore[index]
    Job(make_recipe(values, folder=tmp_path, where="recipe")).check()


def test_fingerprints_follow_items_and_examples() -> None:
    first = data_fingerprint(local("gsm8k", shots=0))
    assert first == data_fingerprint(local("gsm8k", shots=0, batch_size=1))
    others = [local("gsm8k", shots=0, examples=3), local("gsm8k", shots=1), local("nq_open")]
    assert len({first, *map(data_fingerprint, others)}) == 4


def test_texts_that_identify_an_item() -> None:
    class Task:
        @staticmethod
        def doc_to_text(row: Any) -> str:
            return f"Question: {row['question']}"

    row = {"question": "Which?", "choices": {"text": ["A b.", "C"], "label": ["1", "2"]}}
    assert _parts(local("arc_easy"), Task(), row) == ("which", "a b", "c")
    assert _parts(local("arc_easy"), Task(), {"question": "Which?"}) == ("Question: Which?",)
