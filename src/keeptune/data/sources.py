"""Rows from JSONL, JSON, CSV, TSV, Parquet and Arrow files, and from datasets; errors name the row by its number."""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keeptune.core.errors import DataError
from keeptune.data import hub

Row = Mapping[str, Any]


def read_jsonl(path: Path | str, *, where: str, **origin: str | None) -> list[Row]:
    """Returns the rows of a file: JSON lines, one list of JSON objects, ``.csv``, ``.tsv``, ``.parquet`` or ``.arrow``.

    Of a folder and of the name of a dataset on the hub they are those that ``datasets`` reads.

    Args:
        path: The file, the folder, or ``hf://datasets/org/name``.
        where: For error messages.
        origin: ``split``, ``config`` and ``revision`` of a dataset.

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
        raise DataError(
            f"{where} {path}",
            got="no such file",
            wanted="a JSONL file, one object a line",
            next_step="Check the path; relative paths start at the current directory, then at the recipe's folder.",
        )
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
            return _unpadded(parquet.read_table(path).to_pylist())
        with path.open("rb") as file:
            reader = ipc.open_file(file) if file.read(6) == b"ARROW1" else ipc.open_stream(path.read_bytes())
            return _unpadded(reader.read_all().to_pylist())
    except (ArrowException, OSError) as error:
        raise _damaged(where, error, "a Parquet table or an Arrow file") from error


def _unpadded(rows: list[dict[str, Any]]) -> list[Row]:
    """Returns the rows of a table; null in an object there is a key that it does not have."""
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
