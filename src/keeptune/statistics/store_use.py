"""Who uses which entries of a store, and what goes when it is full: the least recently used that nobody uses.

    <key[:2]>/<key>/     an entry; ``recipe.json`` was last read or written when it was last used
    <key[:2]>/.<key>.*   an entry that is being written or removed
    use/users/*.user     a file for each user, locked while there is the user; a line for each entry it uses
    use/models/*         the path or hub id of a model whose fingerprint is the file's name
    use/size             the bytes of all entries, so that a put need not look at each, and the limit of the last put

One lock is held whenever users name entries and whenever entries go: what a user has named stays, or is gone already.
"""

import logging
import os
import re
import secrets
import shutil
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ByteSize

from keeptune.core.artefact import as_written, explain_full_disk, read_json
from keeptune.core.errors import ArtefactError, StatisticsError
from keeptune.core.locks import locked

_log = logging.getLogger(__name__)
_DIGIT = "[0-9a-f]"
_LINE = re.compile(rf"^({_DIGIT}{{64}}) (\d{{1,18}})$", re.MULTILINE)
_OVER = "statistics: what runs use takes %s, more than `store_limit` (%s); it stays in %s as long as they use it"


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry as it lies on disk: its folder, the bytes of its files, and when it was last used (0: damaged)."""

    folder: Path
    bytes: int
    used: float

    @property
    def key(self) -> str:
        """The content key of its recipe."""
        return self.folder.name


def entries(folder: Path) -> list[Entry]:
    """Returns the entries of a store, the least recently used first; none where there is no store."""
    found = []
    for entry in folder.glob(f"{_DIGIT * 2}/{_DIGIT * 64}"):
        try:
            with os.scandir(entry) as inside:
                files = {file.name: file.stat(follow_symlinks=False) for file in inside}
        except OSError:
            continue  # removed meanwhile
        used = files["recipe.json"].st_mtime if "recipe.json" in files else 0.0
        found.append(Entry(entry, sum(file.st_size for file in files.values()), used))
    return sorted(found, key=lambda entry: (entry.used, entry.key))


def size_text(size: float) -> str:
    """Returns a number of bytes as text.

    >>> size_text(20e9)
    '20.0 GB'
    """
    return ByteSize(int(size)).human_readable(decimal=True, separator=" ")


def refuse_larger(size: int, limit: int) -> None:
    """Refuses an entry for which a store has no room even if it were alone; sizes in bytes.

    Raises:
        StatisticsError: The limit is smaller than this entry.
    """
    if size > limit:
        raise StatisticsError(
            "store_limit",
            got=f"{size_text(limit)} ({limit} bytes)",
            wanted=f"room for one entry of {size_text(size)} ({size} bytes), the statistics of one target",
            next_step="Raise `store_limit`, or name fewer `targets`.",
        )


@dataclass(eq=False)
class StoreUse:
    """What one user of a store reads and writes: as long as this object is there, nobody evicts it."""

    folder: Path
    _named: set[str] = field(default_factory=set, init=False)
    _file: Path | None = field(default=None, init=False)
    _warned: bool = field(default=False, init=False)

    def name(self, key: str) -> None:
        """Names an entry that is about to be read; in a folder that cannot be written nothing can be evicted."""
        if key not in self._named and os.access(self.folder, os.W_OK):
            with self._alone():
                self._write(key, 0)

    def make_room(self, key: str, size: int, limit: int) -> None:
        """Names an entry that is about to be written, and evicts others until it fits; sizes in bytes.

        Raises:
            StatisticsError: The limit of the store is smaller than this entry.
        """
        refuse_larger(size, limit)
        with self._alone():
            total = recorded(self.folder)[0]
            if total + size > limit:
                named, present, total = self._held()
                gone = []
                for entry in present:
                    # A hundredth more than is needed, so that not every put looks at every entry.
                    if total <= limit - limit // 100 - size:
                        break
                    if entry.key not in named and entry.key != key and _remove(entry):
                        gone.append(entry.bytes)
                        total -= entry.bytes
                if gone:
                    told = len(gone), size_text(sum(gone)), self.folder
                    _log.info("statistics: %d least recently used entries (%s) evicted from %s", *told)
                if total + size > limit and not self._warned:
                    self._warned = True
                    _log.warning(_OVER, size_text(total + size), size_text(limit), self.folder)
            self._write(key, size)
            self._note(total + size, limit)

    def remove(self, wanted: Callable[[Entry], bool]) -> tuple[list[Entry], list[Entry]]:
        """Removes entries that nobody uses; returns what was removed, and what was wanted but is in use."""
        with self._alone():
            named, present, total = self._held()
            chosen = [entry for entry in present if wanted(entry)]
            kept = [entry for entry in chosen if entry.key in named or not _remove(entry)]
            gone = [entry for entry in chosen if entry not in kept]
            self._note(total - sum(entry.bytes for entry in gone))
        return gone, kept

    def _held(self) -> tuple[dict[str, int], list[Entry], int]:
        """Returns what living users name, the entries that are there, and the bytes of both; forgets dead users."""
        named, present = dict[str, int](), entries(self.folder)
        for file in (self.folder / "use" / "users").glob("*.user"):
            with locked(file, wait=False) as dead:
                if dead:
                    file.unlink()
                    continue
            for key, size in _LINE.findall(file.read_text(encoding="utf-8", errors="replace")):
                named[key] = max(named.get(key, 0), int(size))
        return named, present, sum({**named, **{entry.key: entry.bytes for entry in present}}.values())

    def _note(self, total: int, limit: int | None = None) -> None:
        """Writes ``use/size``; without a limit that of the last put stays."""
        limit = limit or recorded(self.folder)[1]
        (self.folder / "use" / "size").write_text(f"{total} {limit or ''}", encoding="utf-8")

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Holds the lock of all users, and registers this one."""
        with explain_full_disk(self.folder), locked(self.folder / "use" / "lock"):
            if self._file is None:
                self._register()
            yield

    def _register(self) -> None:
        users = self.folder / "use" / "users"
        users.mkdir(exist_ok=True)
        self._file = users / f"{secrets.token_hex(8)}.user"
        held = ExitStack()
        held.enter_context(locked(self._file))
        weakref.finalize(self, held.close)
        named, _, total = self._held()
        for left in self.folder.glob(f"{_DIGIT * 2}/.{_DIGIT * 64}.*"):
            if left.name[1:65] not in named:
                _log.info("%s: left over by a killed run, removed", left)
                shutil.rmtree(left, ignore_errors=True)
        self._note(total)

    def _write(self, key: str, size: int) -> None:
        assert self._file is not None
        with self._file.open("a", encoding="utf-8") as file:
            file.write(f"{key} {size}\n")
        self._named.add(key)


def recorded(folder: Path) -> tuple[int, int | None]:
    """Returns the bytes that a store notes of itself, and the limit of the last put; 0 and None without a note."""
    try:
        numbers = [int(word) for word in (folder / "use" / "size").read_text(encoding="utf-8").split()]
    except (OSError, ValueError):
        numbers = []
    return (numbers[0] if numbers else 0), (numbers[1] if len(numbers) > 1 else None)


def model_names(folder: Path) -> dict[str, str]:
    """Returns the paths or hub ids of the models of a store, by their fingerprints."""
    notes = [file for file in folder.glob("use/models/*") if file.is_file()]
    return {file.name: file.read_text(encoding="utf-8", errors="replace") for file in notes}


def _remove(entry: Entry) -> bool:
    """Removes an entry at once, whatever happens meanwhile; returns whether it could."""
    doomed = entry.folder.with_name(f".{entry.key}.{secrets.token_hex(4)}")
    try:
        entry.folder.replace(doomed)
    except OSError as error:
        _log.warning("statistics: %s cannot be removed (%s)", entry.folder, error)
        return False
    shutil.rmtree(doomed, ignore_errors=True)
    return True


def listing(folder: Path) -> list[dict[str, Any]]:
    """Returns what a store holds by model, data and kind of statistic, the largest first.

    ``model`` and ``data`` are fingerprints, empty for damaged entries and where each text has an entry of its own;
    ``name`` is the model's path or hub id as it was last used; ``used`` is in seconds since 1970.
    """
    groups: dict[tuple[str, str, str], list[Entry]] = {}
    for entry in entries(folder):
        recipe = _recipe(entry)
        source: Mapping[str, Any] = recipe.get("source", recipe)  # entries of texts name the model themselves
        place = (str(source.get("model", "")), str(source.get("data", "")), str(recipe.get("class", "damaged")))
        groups.setdefault(place, []).append(entry)
    names = model_names(folder)
    rows: list[dict[str, Any]] = []
    for (model, data, kind), own in groups.items():
        known = {"model": model, "name": names.get(model, ""), "data": data, "kind": kind, "entries": len(own)}
        rows.append(known | {"bytes": sum(one.bytes for one in own), "used": max(one.used for one in own)})
    return sorted(rows, key=lambda row: (-row["bytes"], row["model"], row["data"], row["kind"]))


def is_of(entry: Entry, model: str, names: Mapping[str, str]) -> bool:
    """Returns whether an entry is of a model, given by its name, the last part of it or a start of its fingerprint."""
    recipe = _recipe(entry)
    key = str(recipe.get("source", recipe).get("model", ""))
    name = names.get(key, "")
    return bool(key) and (key.startswith(model) or (bool(name) and model in (name, Path(name).name)))


def _recipe(entry: Entry) -> dict[str, Any]:
    try:
        with as_written(entry.folder):
            recipe = dict(read_json(entry.folder / "recipe.json")["recipe"])
            return recipe | {"source": dict(recipe.get("source", recipe))}
    except ArtefactError:
        return {}
