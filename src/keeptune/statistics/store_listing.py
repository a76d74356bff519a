"""What a store holds, by model, data and kind of statistic, for the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from keeptune.core.artefact import read_json
from keeptune.core.errors import ArtefactError
from keeptune.statistics.store_use import Entry, entries, model_names


@dataclass(frozen=True)
class StoredKind:
    """Entries of one kind of statistic, of one model and data.

    Args:
        model: Fingerprint of the model; empty for damaged entries.
        name: The model's path or hub id as it was last used; empty where it is not known.
        data: Fingerprint of the data; empty where each text has an entry of its own.
        kind: The statistic's class.
        entries: How many.
        bytes: Of them all.
        used: When one of them was last used, seconds since 1970.
    """

    model: str
    name: str
    data: str
    kind: str
    entries: int
    bytes: int
    used: float


def listing(folder: Path) -> list[StoredKind]:
    """Returns what a store holds, the largest first."""
    groups: dict[tuple[str, str, str], list[Entry]] = {}
    for entry in entries(folder):
        recipe = _recipe(entry)
        source: Mapping[str, Any] = recipe.get("source", recipe)  # entries of texts name the model themselves
        place = (str(source.get("model", "")), str(source.get("data", "")), str(recipe.get("class", "damaged")))
        groups.setdefault(place, []).append(entry)
    names = model_names(folder)
    rows = [
        StoredKind(
            model=model,
            name=names.get(model, ""),
            data=data,
            kind=kind,
            entries=len(own),
            bytes=sum(entry.bytes for entry in own),
            used=max(entry.used for entry in own),
        )
        for (model, data, kind), own in groups.items()
    ]
    return sorted(rows, key=lambda row: (-row.bytes, row.model, row.data, row.kind))


def is_of(entry: Entry, model: str, names: Mapping[str, str]) -> bool:
    """Returns whether an entry is of a model, given by its name, the last part of it or a start of its fingerprint."""
    recipe = _recipe(entry)
    key = str(recipe.get("source", recipe).get("model", ""))
    name = names.get(key, "")
    return bool(key) and (key.startswith(model) or (bool(name) and model in (name, Path(name).name)))


def _recipe(entry: Entry) -> dict[str, Any]:
    try:
        recipe: dict[str, Any] = read_json(entry.folder / "recipe.json")["recipe"]
    except (ArtefactError, KeyError, TypeError):
        return {}
    return recipe
