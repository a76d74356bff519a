"""StatStore: statistics on disk under content keys, shared by every method and run."""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from keeptune.core.artefact import (
    atomic_directory,
    content_key,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from keeptune.core.errors import ArtefactError
from keeptune.core.locks import locked

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Source:
    """What a statistic was taken from; part of every key.

    Args:
        model: Fingerprint of the model's weights.
        data: Fingerprint of the token ids.
        dtype: The dtype the model ran in.
    """

    model: str
    data: str
    dtype: str


@dataclass(frozen=True, slots=True)
class StatStore:
    """A folder of entries, each a folder with ``recipe.json`` and ``value.safetensors``.

    An entry appears whole or not at all; a damaged one is recomputed, never used. Recipes are all that determines it.
    """

    folder: Path

    def get(self, recipe: Mapping[str, Any]) -> Tensor | None:
        """Returns an entry, or None when it is not there or is damaged (which is logged)."""
        return self.read(content_key(recipe))

    def read(self, key: str) -> Tensor | None:
        """Returns an entry by the content key of its recipe, as :meth:`get`."""
        entry = self.folder / key[:2] / key
        if not entry.is_dir():
            return None
        try:
            record = read_json(entry / "recipe.json")
            return read_tensors(entry / "value.safetensors", record["sha256"])["value"]
        except (ArtefactError, KeyError, TypeError) as error:
            _log.warning("statistics: entry %s is damaged and will be recomputed (%s)", entry, error)
            return None

    def holds(self, recipe: Mapping[str, Any]) -> bool:
        """Returns whether an entry is there, damaged or not, without reading it."""
        return self._entry(recipe).is_dir()

    def put(self, recipe: Mapping[str, Any], value: Tensor) -> None:
        """Stores an entry, replacing a damaged one.

        Raises:
            ArtefactError: The disk is full or cannot be written.
        """
        entry = self._entry(recipe)
        try:
            with atomic_directory(entry) as fresh:
                sha256 = write_tensors(fresh / "value.safetensors", {"value": value})
                write_json(fresh / "recipe.json", {"recipe": recipe, "sha256": sha256})
        except OSError as error:
            # Another run stored the same content under the same key meanwhile: theirs is as good.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT) or self.get(recipe) is None:
                raise
            _log.info("statistics: %s was stored by another run meanwhile", entry)

    @contextlib.contextmanager
    def turn(self, names: Collection[str]) -> Iterator[None]:
        """Waits until no other process collects any of some statistics, by key, and has the others wait meanwhile."""
        with contextlib.ExitStack() as held:
            for name in sorted(names):  # in one order, so that no two wait for each other
                held.enter_context(locked(self.folder / "locks" / name[:32]))
            yield

    def _entry(self, recipe: Mapping[str, Any]) -> Path:
        key = content_key(recipe)
        return self.folder / key[:2] / key
