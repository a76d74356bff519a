"""Checkpoints that a run can go on from."""

from __future__ import annotations

import json
import logging
import shutil
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

__all__ = ["last_complete_checkpoint"]

_log = logging.getLogger(__name__)


def last_complete_checkpoint(folder: Path) -> Path | None:
    """Returns the newest checkpoint that a run can go on from, or None; newer ones that are not whole are removed.

    ``trainer_state.json`` is the last file that ``Trainer`` writes of a checkpoint. One without the states of
    the random numbers (``save_only_model``) cannot be gone on from.
    """
    numbered = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    for path in sorted(numbered, key=lambda path: -int(path.name.rpartition("-")[2])):
        if _is_whole(path):
            return path
        _log.warning("training: %s was not written to its end and is removed", path)
        shutil.rmtree(path)
    return None


def _is_whole(checkpoint: Path) -> bool:
    """Check that every file ends where it should; a safetensors header states the size, a zip ends in its index."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        weights = list(checkpoint.rglob("*.safetensors"))
        for path in weights:
            with safe_open(path, framework="pt"):
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    random_states = list(checkpoint.glob("rng_state*.pth"))  # without them the run would go on otherwise
    saved = [*checkpoint.glob("*.pt"), *random_states]
    return bool(weights) and bool(random_states) and all(map(zipfile.is_zipfile, saved))
