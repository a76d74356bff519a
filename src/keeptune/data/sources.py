"""Rows from JSONL, JSON, CSV, TSV, Parquet and Arrow files, and from datasets; templates that are filled from rows."""

from __future__ import annotations

import codecs
import csv
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from keeptune.core.errors import DataError, not_there
from keeptune.data import hub

Row = Mapping[str, Any]


def read_jsonl(path: Path | str, *, where: str, **origin: str | None) -> list[Row]:
    """Returns the rows of a file: JSON lines, one list of JSON objects, ``.csv``, ``.tsv``, ``.parquet`` or ``.arrow``.

    Of a folder and of a dataset on the hub, ``hf://datasets/org/name``, they are those that ``datasets`` reads, by the
    ``split``, ``config`` and ``revision`` of the ``origin``.

    Raises:
        DataError: The file, named by the recipe key ``where``, is missing, is not UTF-8, has a line that is not a JSON
            object, or has no rows.
    """
    if str(path).startswith(hub.PREFIX) or Path(path).is_dir():
        rows: list[Row] = [*hub.load(str(path), where=where, **origin)]
    else:
        rows = _read_file(Path(path), where, origin)
    if not rows:
        raise DataError(f"{where} {path}", got="no rows", wanted="at least one object", next_step="Fill the file.")
    return rows


def _read_file(path: Path, where: str, origin: Mapping[str, str | None]) -> list[Row]:
    if given := [f"{key}: {value}" for key, value in origin.items() if value is not None]:
        raise DataError(
            f"{where} {path}",
            got=f"{', '.join(given)} for a file",
            wanted="a dataset, org/name on the hub or a folder",
            next_step="Leave it out; a file on the hub at a revision is hf://datasets/org/name@revision/file.jsonl.",
        )
    if not path.is_file():
        raise not_there(f"{where} {path}", "file", "a JSONL file, one object a line", DataError)
    try:
        return _READERS.get(path.suffix.lower(), _json)(path, f"{where} {path}")
    except OSError as error:
        raise DataError(
            f"{where} {path}", got=f"{error.strerror}", wanted="a file to read", next_step="Check the file."
        ) from error


def _json(path: Path, where: str) -> list[Row]:
    # Many .json files on the hub are JSONL, and some lists are called .jsonl.
    with path.open("rb") as file:
        if not file.read(64).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            file.seek(0)
            return [
                _checked(_parse(line, place := f"{where} line {number}", "one JSON object in UTF-8"), place)
                for number, line in enumerate(file, start=1)
                if line.strip()
            ]
    values = _parse(path.read_bytes(), where, "a list of JSON objects in UTF-8")
    return [_checked(value, f"{where} row {number}") for number, value in enumerate(values, start=1)]


def _separated(path: Path, where: str) -> list[Row]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = csv.reader(file, csv.excel_tab if path.suffix.lower() == ".tsv" else csv.excel, strict=True)
            names, *lines = [line for line in table if line] or [[]]
    except (csv.Error, UnicodeDecodeError) as error:
        raise _damaged(where, error, "comma-separated text in UTF-8") from error
    for number, line in enumerate(lines, start=1):
        if len(line) != len(names) or len(set(names)) < len(names):
            raise DataError(
                f"{where} row {number}",
                got=f"{len(line)} values for the columns {', '.join(names)}",
                wanted="one value for each column, and different names in the first line",
                next_step="Quote values that hold separators or line breaks.",
            )
    return [dict(zip(names, line, strict=True)) for line in lines]


def _table(path: Path, where: str) -> list[Row]:
    from pyarrow import ArrowException, ipc, parquet

    try:
        if path.suffix.lower() == ".parquet":
            table = parquet.read_table(path)
        else:
            with path.open("rb") as file:
                reader = ipc.open_file(file) if file.read(6) == b"ARROW1" else ipc.open_stream(path.read_bytes())
                table = reader.read_all()
        table.validate(full=True)  # else damaged offsets end the process
        rows = table.to_pylist()
    except (ArrowException, OSError, ValueError, OverflowError) as error:  # the last two: dates that Python has not
        raise _damaged(where, error, "a Parquet table or an Arrow file") from error
    # Null in an object is a key that it does not have.
    return [{key: hub.without_nulls(value) for key, value in row.items()} for row in rows]


_READERS = {".csv": _separated, ".tsv": _separated, ".parquet": _table, ".arrow": _table}


def _parse(text: bytes, where: str, wanted: str) -> Any:
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        if rb"\ud" in text.lower():  # half of a surrogate pair is valid JSON but no text
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # JSON and Unicode errors are ValueErrors
        raise _damaged(where, error, wanted) from error
    return value


def _damaged(where: str, error: Exception, wanted: str) -> DataError:
    return DataError(where, got=str(error).split("\n")[0], wanted=wanted, next_step="Correct it, or get it again.")


def _checked(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise DataError(
            where,
            got=f"a JSON {type(value).__name__}",
            wanted="a JSON object",
            next_step='Write it as {"field": value}.',
        )
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name}, which is not JSON")


# What stands between braces without line breaks may be a column of any name, "Question Text" too.
_BRACES = re.compile(r"\{([^{}\n]+)\}")
_NAME = re.compile(r"[A-Za-z_]\w*(?:\.\w+)*", re.ASCII)
_PATH = re.compile(r"([^.]+)(?:\.\w+)+")


def render(template: str, row: Row, *, where: str) -> str:
    r"""Returns a template filled with the fields of one row; ``where`` is its file and line, for error messages.

    Places are ``{field}``, or ``{turns.0.text}`` inside lists and objects; any other brace is literal, so code and JSON
    need no escapes.

    Raises:
        DataError: The row lacks a field that the template names or nearly names, or holds no text there.

    >>> render("{q}\nAnswer:", {"q": "Where?"}, where="x")
    'Where?\nAnswer:'
    >>> render("{turns.0.text}", {"turns": [{"text": "Where?"}]}, where="x")
    'Where?'
    >>> render("{Question Text} {b: 1}", {"Question Text": True}, where="x")
    'true {b: 1}'
    """

    def fill(match: re.Match[str]) -> str:
        name, (start, end) = match.group(1), match.span()
        if not _is_place(name, row, where):
            return match.group()
        if template[start - 1 : start] == "{" and template[end : end + 1] == "}":
            raise _misspelt(f"{{{{{name}}}}}", name, where)
        return text_of(_field(name, row, where), where=f'{where}, field "{name}"')

    return _BRACES.sub(fill, template)


def render_all(template: str, rows: Sequence[Row], *, where: str) -> tuple[str, ...]:
    """Returns a template filled with each of some rows, as :func:`render` does; one with braces must name a field."""
    texts = tuple(render(template, row, where=f"{where} row {number}") for number, row in enumerate(rows, start=1))
    if "{" in template and all(text == template for text in texts):
        raise DataError(
            where,
            got=f'the template "{template}", which names no field',
            wanted=f"one or more of {', '.join(f'{{{name}}}' for name in rows[0])}",
            next_step="Correct the template.",
        )
    return texts


def pick(template: str, row: Row, *, where: str) -> Any:
    """Returns as :func:`render` does, but of a template that is one bare field the field's own value.

    >>> pick("{choices}", {"choices": ["a", "b"]}, where="x")
    ['a', 'b']
    """
    match = _BRACES.fullmatch(template)
    if match and _is_place(match.group(1), row, where):
        return _field(match.group(1), row, where)
    return render(template, row, where=where)


def text_of(value: Any, *, where: str) -> str:
    """Returns a value as text, numbers and truth values as JSON writes them.

    Raises:
        DataError: It is null, a list, an object, or a number that JSON has not.

    >>> text_of("a", where="x"), text_of(True, where="x"), text_of(1.0, where="x")
    ('a', 'true', '1.0')
    """
    if isinstance(value, str):
        return value
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return json.dumps(value)
    inside = isinstance(value, Mapping | list)
    raise DataError(
        where,
        got="null" if value is None else f"a {type(value).__name__}" if inside else f"{value}",
        wanted="text, a number, true or false",
        next_step="Name a part of it in the template, such as {turns.0.text}, or write it as text in the data."
        if inside
        else 'Fill the field, write "" for an empty text, or remove the row.',
    )


def refuse_empty(texts: Iterable[str], where: str, what: str = "text", unit: str = "row") -> None:
    """Raises DataError where a text is empty; ``what`` it is and its ``unit`` are for the message."""
    for number, text in enumerate(texts, start=1):
        if not text.strip():
            raise DataError(
                f"{where} {unit} {number}",
                got=f"an empty {what}",
                wanted=f"a {what} that is not empty",
                next_step="Fill the row, remove it, or change the template.",
            )


def _is_place(name: str, row: Row, where: str) -> bool:
    """Returns whether braces hold a field; refuses a name that a column nearly has."""
    path = _PATH.fullmatch(name)
    if name in row or (path and path.group(1) in row) or _NAME.fullmatch(name):
        return True
    alike = next((column for column in row if _plain(column) == _plain(name)), None)
    if alike is not None:
        raise _misspelt(f"{{{name}}}", str(alike), where)
    return False


def _plain(name: object) -> str:
    return re.sub(r"[\W_]+", "", str(name)).casefold() or str(name)


def _misspelt(written: str, column: str, where: str) -> DataError:
    return DataError(
        where,
        got=f"{written} in the template",
        wanted=f'{{{column}}}, for the field "{column}"',
        next_step="Correct the template; braces that stand for themselves must not hold a field's name.",
    )


def _field(name: str, row: Row, where: str) -> Any:
    value: Any = row
    for part in [name] if name in row or "." not in name else name.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and int(part) < len(value):
            value = value[int(part)]
        else:
            held = f"a list of {len(value)}" if isinstance(value, list) else f"a {type(value).__name__}"
            held = f"fields {', '.join(map(str, value))}" if isinstance(value, Mapping) else held
            raise DataError(
                where,
                got=held if part == name else f'{held} where "{part}" is looked for',
                wanted=f'the field "{name}" that the template names',
                next_step="Rename the field in the template or in the data.",
            )
    return value
