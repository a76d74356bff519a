from __future__ import annotations

from pathlib import Path

import pytest

from keeptune.core.errors import DataError
from keeptune.data.completions import task_examples
from keeptune.data.sources import read_jsonl
from keeptune.data.templates import pick, render


def written(folder: Path, data: bytes) -> Path:
    path = folder / "rows.jsonl"
    path.write_bytes(data)
    return path


# read_jsonl


def test_rows_are_read_in_order_and_blank_lines_skipped(tmp_path: Path) -> None:
    path = written(tmp_path, '{"a": 1}\n\n  \r\n{"a": "é"}\r\n{"a": null}'.encode())
    assert read_jsonl(path, where="x") == [{"a": 1}, {"a": "é"}, {"a": None}]


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path: Path) -> None:
    assert read_jsonl(written(tmp_path, b'\xef\xbb\xbf{"a": 1}\n'), where="x") == [{"a": 1}]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b'{"a": 1', "Expecting"),
        (b"{'a': 1}", "Expecting property name"),
        (b'{"a": 1} {"a": 2}', "Extra data"),
        (b"[1, 2]", "a JSON list"),
        (b'"text"', "a JSON str"),
        (b"null", "a JSON NoneType"),
        (b'{"a": "\xff"}', "codec can't decode"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": -Infinity}', "Infinity"),
        (b'{"a": "\\ud800"}', "surrogate"),
    ],
    ids=["cut", "quotes", "two", "list", "string", "null", "not-utf8", "nan", "infinity", "half-a-character"],
)
def test_a_malformed_line_is_named_by_its_number(tmp_path: Path, line: bytes, told: str) -> None:
    path = written(tmp_path, b'{"a": 0}\n\n' + line + b'\n{"a": 3}\n')
    with pytest.raises(DataError) as caught:
        read_jsonl(path, where="knowledge.file")
    assert caught.value.where == f"knowledge.file {path} line 3"
    assert told in caught.value.got


@pytest.mark.parametrize("data", [b"", b"\n \n"], ids=["empty", "blank"])
def test_a_file_without_rows_is_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(DataError, match=r"task\.train .*got no rows"):
        read_jsonl(written(tmp_path, data), where="task.train")


def test_a_missing_file_is_told_with_its_key(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"task\.train .*absent\.jsonl: got no such file"):
        read_jsonl(tmp_path / "absent.jsonl", where="task.train")


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_jsonl(tmp_path, where="task.train")


# Templates


def test_only_named_fields_are_places_and_other_braces_are_text() -> None:
    template = 'if (x) {return {"k": {value}};} {} {1} { value }'
    assert render(template, {"value": 3}, where="x") == 'if (x) {return {"k": 3};} {} {1} { value }'


def test_a_filled_text_is_not_filled_again() -> None:
    assert render("{a}{b}", {"a": "{b}", "b": "2"}, where="x") == "{b}2"


def test_pick_gives_the_value_of_a_bare_field_and_text_otherwise() -> None:
    row = {"choices": ["a", "b"], "label": 1}
    assert pick("{choices}", row, where="x") == ["a", "b"]
    assert pick("{label}", row, where="x") == 1
    assert pick(" {label}", row, where="x") == " 1"
    assert pick("constant", row, where="x") == "constant"


@pytest.mark.parametrize("fill", [render, pick])
@pytest.mark.parametrize("template", ["{answer}", "Q: {question} {answer}"])
def test_a_missing_field_is_named_with_those_there_are(fill: object, template: str) -> None:
    with pytest.raises(DataError) as caught:
        fill(template, {"question": "?", "label": 1}, where="task row 7")  # type: ignore[operator]
    assert caught.value.where == "task row 7"
    assert "question, label" in caught.value.got
    assert '"answer"' in caught.value.wanted


# task_examples

ROWS = [{"q": "one", "a": "1"}, {"q": "two", "a": "2"}]


def test_task_examples_are_the_filled_templates_in_order() -> None:
    found = task_examples(ROWS, prompt="{q}?", completion=" {a}", where="task")
    assert found.prompts == ("one?", "two?")
    assert found.completions == (" 1", " 2")
    assert list(found.dataset(None, 0)[0]) == [  # type: ignore[arg-type]
        {"prompt": "one?", "completion": " 1"},
        {"prompt": "two?", "completion": " 2"},
    ]


def test_the_fingerprint_of_a_task_is_of_texts_and_their_order() -> None:
    made = [
        task_examples(rows, prompt=prompt, completion=completion, where="task").fingerprint
        for rows, prompt, completion in [
            (ROWS, "{q}?", " {a}"),
            (ROWS[::-1], "{q}?", " {a}"),
            (ROWS, "{q}", " {a}"),
            (ROWS, "{q}?", "{a}"),
            (ROWS[:1], "{q}?", " {a}"),
        ]
    ]
    assert len(set(made)) == len(made)
    assert task_examples(ROWS, prompt="{q}?", completion=" {a}", where="elsewhere").fingerprint == made[0]


@pytest.mark.parametrize(("prompt", "completion"), [("{b}", "{a}"), ("{q}", "{b}")])
def test_a_task_row_without_a_field_is_named(prompt: str, completion: str) -> None:
    rows = [{"q": "one", "a": "1", "b": "x"}, {"q": "two", "a": "2"}]
    with pytest.raises(DataError, match=r'task row 2: got fields q, a, wanted the field "b"'):
        task_examples(rows, prompt=prompt, completion=completion, where="task")


# The other forms that data have on the hub


def test_a_list_of_objects_in_one_json_file_is_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('[{"a": 1},\n {"a": {"b": [2]}}]', encoding="utf-8")
    assert read_jsonl(tmp_path / "rows.json", where="x") == [{"a": 1}, {"a": {"b": [2]}}]


def test_lines_in_a_file_that_is_called_json_are_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('{"a": 1}\n{"a": 2}\n', encoding="utf-8")
    assert read_jsonl(tmp_path / "rows.json", where="x") == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("text", "told"), [('[{"a": 1}, 2]', "row 2: got a JSON int"), ('[{"a": 1}', "Expecting"), ("[]", "no rows")]
)
def test_a_wrong_list_is_told(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=told):
        read_jsonl(tmp_path / "rows.json", where="x")


def test_a_parquet_table_is_rows(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    rows = [{"a": 1, "turns": [{"text": "x"}]}, {"a": 2, "turns": []}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert read_jsonl(tmp_path / "rows.parquet", where="x") == rows
    (tmp_path / "rows.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match="a Parquet table"):
        read_jsonl(tmp_path / "rows.parquet", where="x")


def test_a_template_reaches_into_lists_and_objects() -> None:
    row = {"turns": [{"from": "human", "text": "Hi"}], "a.b": "dotted", "a": "plain"}
    assert render("{turns.0.text}! {a.b} {a}", row, where="x") == "Hi! dotted plain"
    assert pick("{turns.0}", row, where="x") == {"from": "human", "text": "Hi"}
    for template, told in (
        ("{turns.1.text}", 'a list of 1 where "1"'),
        ("{turns.0.said}", 'fields from, text where "said"'),
        ("{a.c}", 'a str where "c"'),
    ):
        with pytest.raises(DataError, match=told):
            render(template, row, where="x")
