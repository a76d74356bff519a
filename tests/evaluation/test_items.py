from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from keeptune.core.errors import DataError, RecipeError
from keeptune.evaluation.benchmarks import FileBenchmark
from keeptune.evaluation.items import load_items

QUESTIONS: dict[str, Any] = {
    "name": "facts",
    "role": "knowledge",
    "file": "rows.jsonl",
    "metric": "exact_match",
    "prompt": "{question}\nAnswer:",
    "answer": "{answer}",
}
CHOICES = QUESTIONS | {"metric": "multiple_choice", "choices": "{choices}", "answer": "{label}"}
DOCUMENTS: dict[str, Any] = {
    "name": "s",
    "role": "knowledge",
    "file": "rows.jsonl",
    "metric": "cross_entropy",
    "text": "{text}",
}


def choices_of(rows: list[dict[str, Any]], write: Any, **extra: Any) -> list[int | None]:
    filled = [{"question": "q"} | row for row in rows]
    return [item.label for item in load_items(FileBenchmark(**CHOICES | extra), write(filled))]


@pytest.mark.parametrize("fields", [QUESTIONS, CHOICES, DOCUMENTS])
def test_recipe_examples_are_valid(fields: dict[str, Any]) -> None:
    benchmark = TypeAdapter(FileBenchmark).validate_python(fields | {"stop": ["\n", "."]})
    assert benchmark.stop == ("\n", ".")
    assert benchmark == FileBenchmark(**fields, stop=("\n", "."))


def test_unknown_keys_are_errors() -> None:
    with pytest.raises(ValidationError, match="promt"):
        TypeAdapter(FileBenchmark).validate_python(QUESTIONS | {"promt": "x"})


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        (QUESTIONS | {"prompt": None}, 'no "prompt"'),
        (QUESTIONS | {"text": "{text}"}, '"text", which it does not use'),
        (CHOICES | {"choices": None}, 'no "choices"'),
        (DOCUMENTS | {"text": None}, 'no "text"'),
        (DOCUMENTS | {"answer": "{a}"}, '"answer", which it does not use'),
        (QUESTIONS | {"metric": "exact_mach"}, 'Did you mean "exact_match"'),
        (QUESTIONS | {"role": "skill"}, "knowledge or task"),
        (QUESTIONS | {"examples": 0}, "1 or more"),
        (QUESTIONS | {"max_length": 1}, "2 or more"),
        (QUESTIONS | {"stop": ("",)}, "empty string"),
    ],
)
def test_fields_that_do_not_fit_are_recipe_errors(fields: dict[str, Any], found: str) -> None:
    with pytest.raises(RecipeError, match=r"evaluate\.(facts|s)") as caught:
        FileBenchmark(**fields)
    assert found in str(caught.value)


def test_a_missing_field_comes_with_an_example() -> None:
    with pytest.raises(RecipeError, match="Write for example") as caught:
        FileBenchmark(**QUESTIONS | {"answer": None})
    assert "{answer}" in str(caught.value)


def test_questions(write: Any) -> None:
    rows = [
        {"question": "Who?", "answer": ["Ann ", "Anna"], "relation": "name"},
        {"question": "When?", "answer": 1912},
        {"question": "Where?", "answer": "here"},
    ]
    items = load_items(FileBenchmark(**QUESTIONS, examples=2), write(rows))
    assert [item.answers for item in items] == [("Ann", "Anna"), ("1912",)]
    assert [item.prompt for item in items] == ["Who?\nAnswer:", "When?\nAnswer:"]
    assert [item.group for item in items] == ["name", None]
    assert [item.index for item in items] == [0, 1]


@pytest.mark.parametrize("answer", [[], "", ["a", ""], None, {"value": "a"}, True])
def test_bad_answers_name_the_row(answer: Any, write: Any) -> None:
    folder = write([{"question": "q", "answer": "a"}, {"question": "q", "answer": answer}])
    with pytest.raises(DataError, match=r"evaluate\.facts .*rows\.jsonl row 2"):
        load_items(FileBenchmark(**QUESTIONS), folder)


def test_a_missing_file_and_a_missing_field_are_named(tmp_path: Path, write: Any) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_items(FileBenchmark(**QUESTIONS), tmp_path)
    with pytest.raises(DataError, match=r'row 1: .*"answer"'):
        load_items(FileBenchmark(**QUESTIONS), write([{"question": "q"}]))


def test_an_empty_document_is_an_error(write: Any) -> None:
    with pytest.raises(DataError, match="row 2: got an empty document"):
        load_items(FileBenchmark(**DOCUMENTS), write([{"text": "a"}, {"text": " "}]))


@pytest.mark.parametrize(
    ("answer", "label"), [(0, 0), (2, 2), ("1", 1), ("C", 2), ("b", 1), ("green", 1), (" blue ", 2)]
)
def test_readings_of_an_answer(answer: Any, label: int, write: Any) -> None:
    assert choices_of([{"choices": ["red", "green", "blue"], "label": answer}], write) == [label]


def test_labelled_choices_as_in_arc(write: Any) -> None:
    rows = [
        {"choices": {"text": ["x", "y"], "label": ["A", "B"]}, "label": "B"},
        {"choices": {"text": ["x", "y"], "label": ["1", "2"]}, "label": "1"},
    ]
    assert choices_of(rows, write) == [1, 0]


def test_the_whole_file_decides_what_a_row_leaves_open(write: Any) -> None:
    rows = [
        {"choices": ["O", "A", "B", "AB"], "label": "B"},  # as letter 1, as text 2
        {"choices": ["w", "x", "y", "z"], "label": "D"},
    ]
    assert choices_of(rows, write) == [1, 3]
    with pytest.raises(DataError, match="as letter and as text means different choices"):
        choices_of(rows[:1], write)


def test_json_numbers_are_indices(write: Any) -> None:
    assert choices_of([{"choices": ["4", "2", "1", "0"], "label": 1}], write) == [1]
    assert choices_of([{"choices": [4, 2, 1, 0], "label": 3}], write) == [3]


@pytest.mark.parametrize("answer", [3, -1, "D", "yellow", True, None, 1.5, "²", "", ["a"]])
def test_bad_labels_name_the_row(answer: Any, write: Any) -> None:
    rows = [{"choices": ["red", "green", "blue"], "label": given} for given in ("A", answer, "B")]
    with pytest.raises(DataError, match=r"rows\.jsonl row 2 answer"):
        choices_of(rows, write)


@pytest.mark.parametrize(
    "choices",
    [
        ["one"],
        "one two",
        None,
        {"text": ["a", "b"]},
        ["a", ["b"]],
        {"text": ["a", "b"], "label": ["A"]},
        {"text": "ab", "label": "AB"},
    ],
)
def test_bad_choices_name_the_row(choices: Any, write: Any) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl row 1 choices"):
        choices_of([{"choices": choices, "label": 0}], write)
