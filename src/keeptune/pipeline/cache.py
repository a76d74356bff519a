"""Results on disk under content keys: what is there under the key is taken, what is not is computed and written."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from keeptune.core.artefact import as_written, content_key, file_checksum, need_files, read_json, write_json
from keeptune.core.errors import KeeptuneError
from keeptune.core.processes import by_first

T = TypeVar("T")
_log = logging.getLogger(__name__)


def take(stage: str, place: Path, key: str, read: Callable[[], tuple[str, T]]) -> T | None:
    """Returns the result at a place; None where it is missing, damaged or of another key (logged).

    Args:
        stage: What to call it in the log.
        place: The file or folder.
        key: The key of all that the result depends on.
        read: Reads the key that the result was made under, and the result.
    """
    if not place.exists():
        return None
    try:
        with as_written(place):
            made_under, result = read()
    except KeeptuneError as error:
        _log.warning("%s: %s is damaged (%s); computing it again", stage, place, error)
        return None
    if made_under != key:
        _log.info("%s: %s was made from other inputs; computing it again", stage, place)
        return None
    _log.info("%s: taken from %s", stage, place)
    return result


def unchanged(stage: str, path: Path, report: Mapping[str, Any]) -> dict[str, Any] | None:
    """Returns the report at a place where it differs from another in when it was ``created`` alone."""

    def read() -> tuple[str, dict[str, Any]]:
        there: dict[str, Any] = read_json(path)
        return content_key({key: value for key, value in there.items() if key != "created"}), there

    return take(stage, path, content_key(report), read)


@dataclass(frozen=True)
class Stored:
    """A result of a stage: a JSON record with its key, and the checksums of the files that belong to it.

    Example::

        record = Stored("evaluate arc", folder / "arc.json", key).get(compute)

    Args:
        stage: What to call it in the log.
        path: The record.
        key: The key of all that the result depends on (:func:`keeptune.core.artefact.content_key`).
    """

    stage: str
    path: Path
    key: str

    def get(self, compute: Callable[[], Mapping[str, Any]], *, files: Iterable[str] = ()) -> dict[str, Any]:
        """Returns the record as it is read, computed and written where it is missing, damaged or of another key.

        Args:
            compute: Makes the record, and writes the files that belong to it.
            files: Patterns of these files, relative to the record's folder.
        """
        record = self.read()
        return self.write(compute(), files=files) if record is None else record

    def read(self) -> dict[str, Any] | None:
        """Returns the record; None where it is missing, of another key, or it or one of its files is damaged."""
        return by_first(lambda: take(self.stage, self.path, self.key, self._read))

    def write(
        self, record: Mapping[str, Any], *, files: Iterable[str] = (), folder: Path | None = None
    ) -> dict[str, Any]:
        """Writes the record, after the files that belong to it: only a record makes a result; returns it as it is read.

        Of several processes all call it, and the first one writes.

        Args:
            record: Its fields.
            files: Patterns of the files, relative to the record's folder.
            folder: The folder that will take the place of the record's own
                (:func:`keeptune.core.artefact.atomic_directory`), if it is written there first.

        Raises:
            ArtefactError: The disk is full or cannot be written.
        """
        return by_first(lambda: self._write(record, files, self.path if folder is None else folder / self.path.name))

    def _write(self, record: Mapping[str, Any], files: Iterable[str], path: Path) -> dict[str, Any]:
        paths = sorted({file for pattern in files for file in path.parent.glob(pattern)})
        sums = {str(file.relative_to(path.parent)): file_checksum(file) for file in paths}
        write_json(path, {"key": self.key, **record} | ({"files": sums} if sums else {}), checked=True)
        return dict(read_json(path))

    def _read(self) -> tuple[str, dict[str, Any]]:
        record = read_record(self.path)
        return str(record["key"]), record


def read_record(path: Path, again: str = "Run the stage again.") -> dict[str, Any]:
    """Returns the record of a stage whose files are as they were written; an ArtefactError says what is damaged."""
    record: dict[str, Any] = read_json(path, again)
    with as_written(path, again=again):
        need_files(path.parent, record.get("files", {}), again)
    return record
