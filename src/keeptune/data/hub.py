"""Data files on the Hugging Face hub: ``hf://datasets/org/name[@revision]/path/file.jsonl``.

A name of another form, or a file that the hub does not give, raises DataError.
"""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from keeptune.core.errors import DataError

PREFIX = "hf://"
_NAME = re.compile(r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?/(?P<file>.+)")


def fetch(name: str) -> Path:
    """Returns the local copy of a data file, downloaded into the hub's cache if it is not there."""
    match = _parsed(name)
    try:
        return Path(hf_hub_download(match["repo"], match["file"], repo_type="dataset", revision=match["revision"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().split("\n")[0]
        raise DataError(
            name,
            got=f"{type(error).__name__}: {first}",
            wanted="a file that the hub gives",
            next_step="Check the name, the network and your access (`hf auth login`).",
        ) from error


def cached(name: str) -> Path | str:
    """Returns the local copy of a data file, without the network; its name where the cache has none."""
    match = _parsed(name)
    path = try_to_load_from_cache(match["repo"], match["file"], repo_type="dataset", revision=match["revision"])
    return Path(path) if isinstance(path, str) else name


def _parsed(name: str) -> re.Match[str]:
    match = _NAME.fullmatch(name)
    if match is None:
        raise DataError(
            name,
            got="a hub name of another form",
            wanted="hf://datasets/org/name/file.jsonl",
            next_step="Name one file of a dataset repository.",
        )
    return match
