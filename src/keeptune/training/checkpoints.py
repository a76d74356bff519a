"""Checkpoints that training goes on from: the checksum of every file is written last, and checked first."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from keeptune.core.artefact import file_checksum, read_json, write_json
from keeptune.core.errors import ArtefactError

_log = logging.getLogger(__name__)
_CHECKSUMS = "checksums.json"


class Checksums(TrainerCallback):
    """Writes the checksums of a checkpoint's files once all processes have written theirs."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Writes ``checksums.json`` into the newest checkpoint."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir)) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            write_json(folder / _CHECKSUMS, _sums(folder))


def last_complete_checkpoint(folder: Path) -> Path | None:
    """Returns the newest checkpoint that a run can go on from, or None; newer ones that are not whole are removed.

    One without the states of the random numbers (``save_only_model``) cannot be gone on from.
    """
    numbered = [path for path in folder.glob("checkpoint-*") if path.name.rpartition("-")[2].isdecimal()]
    for path in sorted(numbered, key=lambda path: -int(path.name.rpartition("-")[2])):
        if _is_whole(path):
            return path
        _log.warning("training: %s is not as it was written, or not to its end: it is removed", path)
        shutil.rmtree(path)
    return None


def _is_whole(checkpoint: Path) -> bool:
    try:
        return any(checkpoint.glob("rng_state*.pth")) and bool(read_json(checkpoint / _CHECKSUMS) == _sums(checkpoint))
    except (ArtefactError, OSError):
        return False


def _sums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _CHECKSUMS)
    return {str(path.relative_to(folder)): file_checksum(path) for path in files}
