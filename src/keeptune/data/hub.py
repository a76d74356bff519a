"""Data on the Hugging Face hub: ``hf://datasets/org/name[@revision]``, of which ``/path/file.jsonl`` is one file.

A name of another form, or what the hub does not give, raises DataError.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from datasets import DatasetDict, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from keeptune.core.errors import DataError

PREFIX = "hf://"
_DATASETS = "hf://datasets/"
_NAME = re.compile(r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?(/(?P<file>.+))?")
_DATASET = re.compile(r"[\w.-]+/[\w.-]+(@[\w.-]+)?")
_OF_FILES = {".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow"}


def dataset_named(name: str) -> str | None:
    """Returns the whole name of a dataset on the hub; None where a name is not of the form ``org/name[@revision]``.

    >>> dataset_named("org/name@v1"), dataset_named("data/train.jsonl")
    ('hf://datasets/org/name@v1', None)
    """
    is_file = Path(name).suffix.lower() in _OF_FILES
    return None if is_file or _DATASET.fullmatch(name) is None or name.startswith(".") else f"{_DATASETS}{name}"


def load(
    name: str, *, where: str, split: str | None = None, config: str | None = None, revision: str | None = None
) -> list[dict[str, Any]]:
    """Returns the rows of a dataset: one of the hub, a folder of data files, or one that ``datasets`` saved.

    ``split`` is ``train`` where it is None, ``config`` which of several configurations, ``revision`` a branch or tag.
    """
    repo, _, at = name.removeprefix(_DATASETS).partition("@" if name.startswith(_DATASETS) else "\0")
    saved = any((Path(name) / file).is_file() for file in ("dataset_dict.json", "state.json"))
    wanted = split or "train"
    try:
        if saved:
            found = load_from_disk(name)
            splits = found if isinstance(found, DatasetDict) else {"train": found}
            if wanted not in splits:
                raise ValueError(f'Unknown split "{wanted}". Should be one of {list(splits)}.')
            found = splits[wanted]
        else:
            found = load_dataset(repo, config, split=wanted, revision=revision or at or None)
        found.data.validate(full=True)  # else damaged offsets end the process
    except (DatasetsError, HfHubHTTPError, OSError, ValueError, RuntimeError) as error:
        raise _not_given(f"{where} {name}", error, "a dataset: a folder, or org/name on the hub") from error
    # Arrow gives all objects of a column the same keys; columns of JSON keep their own.
    padded = {name for name, feature in found.features.items() if "Json(" not in str(feature)}
    rows: list[dict[str, Any]] = found.to_list()
    return [{key: without_nulls(value) if key in padded else value for key, value in row.items()} for row in rows]


def without_nulls(value: Any) -> Any:
    """Returns a value without the keys that are null in the objects in it."""
    if isinstance(value, dict):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


def fetch(name: str) -> Path | str:
    """Returns the local copy of a data file, downloaded into the hub's cache if it is not there.

    The name of a whole dataset is returned as it is.
    """
    match = _parsed(name)
    if match["file"] is None:
        return name
    try:
        return Path(hf_hub_download(match["repo"], match["file"], repo_type="dataset", revision=match["revision"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise _not_given(name, error, "a file that the hub gives") from error


def cached(name: str) -> Path | str:
    """Returns the local copy of a data file, without the network; its name where the cache has none."""
    match = _parsed(name)
    if match["file"] is None:
        return name
    path = try_to_load_from_cache(match["repo"], match["file"], repo_type="dataset", revision=match["revision"])
    return Path(path) if isinstance(path, str) else name


def _not_given(where: str, error: Exception, wanted: str) -> DataError:
    first = str(error).strip().split("\n")[0]
    next_step = "Check the name, `split`, `config`, `revision`, the network and your access (`hf auth login`)."
    return DataError(where, got=f"{type(error).__name__}: {first}", wanted=wanted, next_step=next_step)


def _parsed(name: str) -> re.Match[str]:
    match = _NAME.fullmatch(name)
    if match is None:
        raise DataError(
            name,
            got="a hub name of another form",
            wanted="hf://datasets/org/name, or hf://datasets/org/name/file.jsonl",
            next_step="Name a dataset, or one file of it.",
        )
    return match
