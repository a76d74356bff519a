"""StatStore: statistics on disk under content keys, shared by every method and run; TextEntries: of single texts."""

import contextlib
import errno
import logging
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from torch import Tensor
from tqdm.auto import tqdm

from keeptune.core.artefact import (
    as_written,
    atomic_directory,
    canonical_json,
    content_key,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
    write_text,
)
from keeptune.core.errors import ArtefactError
from keeptune.core.locks import locked
from keeptune.core.processes import by_first, gathered, share
from keeptune.statistics.store_use import StoreUse, entries, model_names, size_text

_log = logging.getLogger(__name__)
DEFAULT_LIMIT = 20 * 10**9
_FRAME = 1024  # of an entry besides its numbers and recipe, at most


@dataclass(frozen=True, slots=True)
class Source:
    """What a statistic was taken from, by fingerprints of weights and token ids; part of every key."""

    model: str
    data: str
    dtype: str


@dataclass(frozen=True, slots=True)
class StatStore:
    """A folder of entries, each a folder with ``recipe.json`` and ``value.safetensors``.

    An entry appears whole or not at all; a damaged one is recomputed, never used. Recipes are all that determines it.
    What this object has read or written stays as long as it is there (:mod:`keeptune.statistics.store_use`). Before a
    put that would exceed the limit, in bytes, the least recently used entries go.
    """

    folder: Path
    limit: int = DEFAULT_LIMIT
    use: StoreUse = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "use", StoreUse(self.folder))

    def get(self, recipe: Mapping[str, Any]) -> Tensor | None:
        """Returns an entry, or None when it is not there or is damaged (which is logged)."""
        return self.read(content_key(recipe))

    def read(self, key: str) -> Tensor | None:
        """Returns an entry by the content key of its recipe, as :meth:`get`."""
        entry = self._entry(key)
        if not self._use(entry):
            return None
        try:
            with as_written(entry):
                record = read_json(entry / "recipe.json")
                return read_tensors(entry / "value.safetensors", record["sha256"])["value"]
        except ArtefactError as error:
            _log.warning("statistics: entry %s is damaged and will be recomputed (%s)", entry, error)
            return None

    def holds(self, recipe: Mapping[str, Any]) -> bool:
        """Returns whether an entry is there, damaged or not, without reading it."""
        return self._use(self._entry(content_key(recipe)))

    def put(self, recipe: Mapping[str, Any], value: Tensor) -> None:
        """Stores an entry, replacing a damaged one, after evicting others where the limit asks for it.

        Raises:
            ArtefactError: The disk is full or cannot be written.
            StatisticsError: The limit is smaller than this entry.
        """
        entry = self._entry(content_key(recipe))
        size = value.nbytes + _FRAME + 3 * len(canonical_json(recipe))
        try:
            self.use.make_room(entry.name, size, self.limit)
            with atomic_directory(entry) as fresh:
                sha256 = write_tensors(fresh / "value.safetensors", {"value": value})
                write_json(fresh / "recipe.json", {"recipe": recipe, "sha256": sha256})
        except ArtefactError as error:
            if error.wanted != "room to write":
                raise
            raise self._without_room(error, size) from error
        except OSError as error:
            # Another run stored the same content under the same key meanwhile: theirs is as good.
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT) or self.get(recipe) is None:
                raise
            _log.info("statistics: %s was stored by another run meanwhile", entry)

    def note_model(self, fingerprint: str, name: str) -> None:
        """Notes the path or hub id of a model, for whoever lists the store."""
        note = self.folder / "use" / "models" / fingerprint
        if name and os.access(self.folder, os.W_OK) and model_names(self.folder).get(fingerprint) != name:
            write_text(note, name)

    @contextlib.contextmanager
    def turn(self, names: Collection[str]) -> Iterator[None]:
        """Waits until no other process collects any of some statistics, by key, and has the others wait meanwhile."""
        with contextlib.ExitStack() as held:
            for name in sorted(names):  # in one order, so that no two wait for each other
                held.enter_context(locked(self.folder / "locks" / name[:32]))
            yield

    def _use(self, entry: Path) -> bool:
        """Returns whether an entry is there; if it is, it stays as long as this object, and counts as used just now."""
        if not entry.is_dir():
            return False
        self.use.name(entry.name)
        with contextlib.suppress(OSError):  # evicted just before it was named, damaged, or not ours to touch
            os.utime(entry / "recipe.json")
        return entry.is_dir()

    def _without_room(self, error: ArtefactError, size: int) -> ArtefactError:
        free = shutil.disk_usage(next(path for path in (self.folder, *self.folder.parents) if path.exists())).free
        held = sum(entry.bytes for entry in entries(self.folder))
        return ArtefactError(
            f"store {self.folder}",
            got=f"{error.got} for an entry of {size_text(size)}: {size_text(free)} are free, and the store has "
            f"{size_text(held)} of at most {size_text(self.limit)}",
            wanted="room to write",
            next_step="Free space (`keeptune store clear`), lower `store_limit` so that old entries go, or set `store` "
            "to another folder; nothing was left half-written. The same command goes on from here.",
        )

    def _entry(self, key: str) -> Path:
        return self.folder / key[:2] / key


Text = TypeVar("Text")


@dataclass(frozen=True, slots=True)
class TextEntries(Generic[Text]):
    """The entries of texts, one each; the key does not depend on the rest of the data.

    Without a store nothing is kept. Of the model, kind, version of the numbers and options are the key; ``title`` heads
    log messages and the progress bar.
    """

    store: StatStore | None
    source: Source | None
    kind: str
    version: int
    options: Mapping[str, Any]
    title: str

    def recipe(self, text: Text) -> dict[str, Any]:
        """Returns all that determines the entry of a text."""
        assert self.source is not None
        return {
            "class": self.kind,
            "version": self.version,
            "request": dict(self.options),
            "text": text,
            "model": self.source.model,
            "dtype": self.source.dtype,
        }

    def fill(
        self,
        texts: Iterable[Text],
        measure: Callable[[Sequence[Text]], Iterator[Sequence[tuple[Text, Tensor]]]],
        *,
        keep: bool,
    ) -> dict[Text, Tensor]:
        """Measures the texts that have no entry yet, each once, and stores them as soon as they are measured.

        Several processes divide them; without a store each measures all.
        ``measure`` yields the results of the texts it is given, batch by batch.

        Returns:
            The value of each text, stored ones as float32; without ``keep`` none of them is held in memory.
        """
        values: dict[Text, Tensor] = {}
        missing: list[Text] = []
        unique = dict.fromkeys(texts)
        for text in unique:
            value = None if self.store is None else self.store.get(self.recipe(text))
            if value is None:
                missing.append(text)
            elif keep:
                values[text] = value
        if len(missing) < len(unique):
            present = len(unique) - len(missing)
            folder = self.store and self.store.folder
            _log.info("%s: %d of %d texts taken from %s", self.title, present, len(unique), folder)
        own = missing if self.store is None else share(by_first(lambda: missing))
        if own:
            start = time.monotonic()
            with tqdm(total=len(own), desc=self.title, unit="text", delay=2, disable=None, leave=False) as bar:
                for results in measure(own):
                    if not bar.n:
                        seconds = time.monotonic() - start
                        _log.info("%s: %d of %d texts took %.2g s", self.title, len(results), len(own), seconds)
                    for text, value in results:
                        if self.store is not None:
                            self.store.put(self.recipe(text), value.float())
                        if keep:
                            values[text] = value
                    bar.update(len(results))
        for part in gathered({text: values[text] for text in own if keep}):
            values |= part
        return values
