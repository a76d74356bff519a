"""Rows from JSONL, JSON and Parquet files; errors name the row by its number."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keeptune.core.errors import DataError

Row = Mapping[str, Any]


def read_jsonl(path: Path | str, *, where: str) -> list[Row]:
    """Returns the rows of a JSON-lines file, a ``.json`` file with one list of objects, or a ``.parquet`` table.

    Raises:
        DataError: The file, named by the recipe key ``where``, is missing, is not UTF-8, has a line that is not a JSON
            object, or has no rows.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(
            f"{where} {path}",
            got="no such file",
            wanted="a JSONL file, one object a line",
            next_step="Check the path; relative paths start at the current directory, then at the recipe's folder.",
        )
    readers = {".json": _listed, ".parquet": _tabled}
    rows = readers.get(path.suffix, _lines)(path, f"{where} {path}")
    if not rows:
        raise DataError(f"{where} {path}", got="no rows", wanted="at least one object", next_step="Fill the file.")
    return rows


def _lines(path: Path, where: str) -> list[Row]:
    with path.open("rb") as file:
        return [_object(line, f"{where} line {number}") for number, line in enumerate(file, start=1) if line.strip()]


def _listed(path: Path, where: str) -> list[Row]:
    text = path.read_bytes()
    if not text.lstrip().startswith(b"["):
        return _lines(path, where)  # many .json files on the hub are JSONL
    values = _parse(text, where, "a list of JSON objects in UTF-8")
    return [_checked(value, f"{where} row {number}") for number, value in enumerate(values, start=1)]


def _tabled(path: Path, where: str) -> list[Row]:
    from pyarrow import ArrowException, parquet

    try:
        rows: list[Row] = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise DataError(
            where, got=str(error).split("\n")[0], wanted="a Parquet table", next_step="Get the file again."
        ) from error
    return rows


def _object(line: bytes, where: str) -> Row:
    return _checked(_parse(line, where, "one JSON object in UTF-8"), where)


def _parse(text: bytes, where: str, wanted: str) -> Any:
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        if rb"\ud" in text.lower():  # half of a surrogate pair is valid JSON but no text
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # JSON and Unicode errors are ValueErrors
        raise DataError(where, got=f"{error}", wanted=wanted, next_step="Correct or remove it.") from error
    return value


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
