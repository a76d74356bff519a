"""Rows from JSONL files, and from the other forms data have on the hub: every malformed row is named by its number."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keeptune.core.errors import DataError

__all__ = ["Row", "read_jsonl"]

Row = Mapping[str, Any]


def read_jsonl(path: Path | str, *, where: str) -> list[Row]:
    """Read a JSON-lines file of objects, a ``.json`` file with one list of them, or a ``.parquet`` table.

    Args:
        path: The file; blank lines are skipped.
        where: The recipe key that named the file, for error messages (``"knowledge.file"``).

    Returns:
        One mapping per line, in file order.

    Raises:
        DataError: The file is missing, is not UTF-8, has a line that is not a JSON object, or has no rows.
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
        return [_parse(line, f"{where} line {number}") for number, line in enumerate(file, start=1) if line.strip()]


def _listed(path: Path, where: str) -> list[Row]:
    text = path.read_bytes()
    if not text.lstrip().startswith(b"["):
        return _lines(path, where)  # many .json files on the hub are JSONL
    try:
        values = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise DataError(
            where, got=f"{error}", wanted="a list of JSON objects in UTF-8", next_step="Mend it."
        ) from error
    for number, value in enumerate(values, start=1):
        if not isinstance(value, dict):
            raise DataError(
                f"{where} row {number}",
                got=f"a JSON {type(value).__name__}",
                wanted="a JSON object",
                next_step='Write the row as {"field": value}.',
            )
    return list(values)


def _tabled(path: Path, where: str) -> list[Row]:
    from pyarrow import ArrowException, parquet

    try:
        rows: list[Row] = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise DataError(
            where, got=str(error).split("\n")[0], wanted="a Parquet table", next_step="Get the file again."
        ) from error
    return rows


def _parse(line: bytes, where: str) -> Row:
    try:
        value = json.loads(line, parse_constant=_refuse_constant)
        if rb"\ud" in line.lower():  # half of a surrogate pair is valid JSON but no text
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # JSON and Unicode errors are ValueErrors
        raise DataError(
            where, got=f"{error}", wanted="one JSON object in UTF-8", next_step="Mend or remove the line."
        ) from error
    if not isinstance(value, dict):
        raise DataError(
            where,
            got=f"a JSON {type(value).__name__}",
            wanted="a JSON object",
            next_step='Write the line as {"field": value}.',
        )
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name}, which is not JSON")
