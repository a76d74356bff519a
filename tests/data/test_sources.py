from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keeptune.core.errors import DataError
from keeptune.data.completions import task_examples
from keeptune.data.sources import pick, read_jsonl, render


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


def test_an_empty_folder_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"task\.train .*a dataset: a folder"):
        read_jsonl(tmp_path, where="task.train")


# Templates


def test_only_named_fields_are_places_and_other_braces_are_text() -> None:
    template = 'if (x) {return {"k": {value}};} {} {1} { other } {x: {value}}'
    assert render(template, {"value": 3}, where="x") == 'if (x) {return {"k": 3};} {} {1} { other } {x: 3}'


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


@pytest.mark.parametrize("name", ["Question Text", "问题", "so-called", "a/b (c)", "q?", "1st"])
def test_a_column_of_any_name_fills_its_template(name: str) -> None:
    assert render(f"Q: {{{name}}}!", {name: "Where"}, where="x") == "Q: Where!"
    assert pick(f"{{{name}}}", {name: ["a"]}, where="x") == ["a"]


@pytest.mark.parametrize("template", ["{{q}}", "{ q }", "{Q Text}", "{q-text}", "a {{q}} b"])
def test_braces_that_nearly_spell_a_column_are_refused(template: str) -> None:
    with pytest.raises(DataError, match=r"wanted \{q( text)?\}"):
        render(template, {"q": "1", "q text": "2"}, where="x")


@pytest.mark.parametrize("template", ["{no such}", '{"q": 1}', "{}{"])
def test_a_template_that_fills_nothing_is_refused(template: str) -> None:
    with pytest.raises(DataError, match=r"names no field, wanted one or more of \{q\}, \{a\}"):
        task_examples([{"q": "1", "a": "2"}], prompt=template, completion="{a}", where="task")


@given(st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.lists(st.text()) | st.just({"a": 1}))
def test_values_are_text_as_json_writes_them_or_errors(value: object) -> None:
    fits = isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
    if not fits:
        with pytest.raises(DataError, match='x, field "a"'):
            render("{a}", {"a": value}, where="x")
        return
    text = render("{a}", {"a": value}, where="x")
    assert text == value if isinstance(value, str) else json.loads(text) == value


def test_empty_completions_are_counted_and_all_of_them_refused(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"q": "1", "a": "2"}, {"q": "1", "a": ""}, {"q": "1", "a": " \n"}]
    assert len(task_examples(rows, prompt="{q}", completion="{a}", where="task.train")) == 3
    assert "task.train: 2 of 3 completions are empty: only their end is learned (rows 2, 3)" in caplog.text
    with pytest.raises(DataError, match="2 rows, all with empty completions"):
        task_examples(rows[1:], prompt="{q}", completion="{a}", where="task.train")


# task_examples

ROWS = [{"q": "one", "a": "1"}, {"q": "two", "a": "2"}]


def test_task_examples_are_the_filled_templates_in_order() -> None:
    found = task_examples(ROWS, prompt="{q}?", completion=" {a}", where="task")
    assert found.prompts == ("one?", "two?")
    assert found.completions == (" 1", " 2")
    assert found.read_texts == ["one? 1", "two? 2"]


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

    rows = [{"a": 1, "turns": [{"text": "x"}]}, {"a": None, "turns": [{"other": "x"}]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert read_jsonl(tmp_path / "rows.parquet", where="x") == rows
    (tmp_path / "rows.parquet").write_bytes(b"no table")
    with pytest.raises(DataError, match="a Parquet table"):
        read_jsonl(tmp_path / "rows.parquet", where="x")


PRETTY = json.dumps([{"q": "é", "a": "1"}, {"q": "x", "a": "2"}], indent=2, ensure_ascii=False)
SEPARATED = 'q,a\r\né,1\r\n"x",2\r\n'


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "byte-order-mark"])
@pytest.mark.parametrize(
    ("name", "text"),
    [("t.json", PRETTY), ("t.jsonl", PRETTY), ("t.csv", SEPARATED), ("t.TSV", SEPARATED.replace(",", "\t"))],
)
def test_the_same_rows_from_every_kind_of_text_file(name: str, text: str, mark: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(mark + text, encoding="utf-8", newline="")
    assert read_jsonl(tmp_path / name, where="x") == json.loads(PRETTY)


def test_an_arrow_file_is_rows(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = [{"a": 1, "turns": [{"text": "x"}]}, {"a": 2, "turns": []}]
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    [path] = (tmp_path / "saved").glob("*.arrow")
    assert read_jsonl(path, where="x") == rows
    path.write_bytes(b"no table")
    with pytest.raises(DataError, match="an Arrow file"):
        read_jsonl(path, where="x")


@pytest.mark.parametrize(
    ("text", "told"),
    [("q,a\n1,2\n3\n", "row 2: got 1 values"), ("q,q\n1,2\n", "different names"), ("q,a\n", "no rows")],
)
def test_a_wrong_table_is_refused(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=told):
        read_jsonl(tmp_path / "t.csv", where="x")


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
