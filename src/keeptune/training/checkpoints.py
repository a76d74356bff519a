"""Checkpoints that training goes on from: the checksum of every file is written last, and checked first.

They are as the launcher divides the training: whole (adapter and ``optimizer.pt``), or in FSDP2's shards. Shards fit
any number of processes; where a training is divided otherwise than its checkpoint, :func:`go_on` reads it for that.
"""

import logging
import pickle
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, set_peft_model_state_dict
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_optimizer_state_dict
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from keeptune.core.artefact import file_checksum, read_json, write_json
from keeptune.core.errors import ArtefactError

_log = logging.getLogger(__name__)
_CHECKSUMS = "checksums.json"
# Where FSDP2 keeps the weights and the optimiser's states, by the form that it is told to write.
_FILES = {
    "SHARDED_STATE_DICT": ("pytorch_model_fsdp_0", "optimizer_0"),
    "FULL_STATE_DICT": ("pytorch_model_fsdp.bin", "optimizer.bin"),
}


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


def go_on(trainer: Any, checkpoint: Path) -> None:
    """Trains from a checkpoint, whole or in shards; the trainer's own weights may be either."""
    plugin = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    form = None if plugin is None else plugin.state_dict_type.name
    written = next((one for one, files in _FILES.items() if (checkpoint / files[0]).exists()), None)
    if written != form:
        _log.info("training: %s is read for weights that are divided otherwise", checkpoint)
        _load_weights(trainer, checkpoint, written)
        trainer._load_from_checkpoint = lambda *_: None
        trainer._load_optimizer_and_scheduler = lambda _: _load_optimizer(trainer, checkpoint, written)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    except pickle.UnpicklingError as error:  # its checksums are right: somebody else wrote both
        raise ArtefactError(
            str(checkpoint),
            got="pickled objects that training does not write: nothing of them was run",
            wanted="a checkpoint as training wrote it",
            next_step="Remove it; training goes on from the one before it, or from the start.",
        ) from error


def _load_weights(trainer: Any, checkpoint: Path, written: str | None) -> None:
    """Loads what was trained into a model that is not divided yet."""
    model = trainer.model
    if written is None:
        sharded, trainer.is_fsdp_enabled = trainer.is_fsdp_enabled, False
        trainer._load_from_checkpoint(str(checkpoint))
        trainer.is_fsdp_enabled = sharded
        return
    weights = _read(checkpoint / _FILES[written][0], "model")
    if written == "SHARDED_STATE_DICT" and isinstance(model, PeftModel):
        set_peft_model_state_dict(model, weights)
    else:
        model.load_state_dict(weights, strict=False)


def _load_optimizer(trainer: Any, checkpoint: Path, written: str | None) -> None:
    """Loads the states of optimiser and schedule into a trainer whose model is divided."""
    if written is None:
        names = {parameter: name for name, parameter in trainer.model.named_parameters()}
        order = [names[parameter] for group in trainer.optimizer.param_groups for parameter in group["params"]]
        kept = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
        groups = [{**group, "params": [order[n] for n in group["params"]]} for group in kept["param_groups"]]
        kept = {"state": {order[n]: state for n, state in kept["state"].items()}, "param_groups": groups}
    else:
        kept = _read(checkpoint / _FILES[written][1], "optimizer")
    set_optimizer_state_dict(trainer.model, trainer.optimizer, kept, options=StateDictOptions(full_state_dict=True))
    trainer.lr_scheduler.load_state_dict(torch.load(checkpoint / "scheduler.pt", weights_only=True))


def _read(path: Path, key: str) -> Any:
    """Reads a file of FSDP2's, or joins a folder of its shards."""
    if path.is_file():
        return torch.load(path, map_location="cpu", weights_only=True)
    with tempfile.TemporaryDirectory(prefix="keeptune-") as scratch:
        dcp_to_torch_save(path, Path(scratch) / "whole.bin")
        return torch.load(Path(scratch) / "whole.bin", weights_only=True)[key]


def _is_whole(checkpoint: Path) -> bool:
    try:
        return any(checkpoint.glob("rng_state*.pth")) and bool(read_json(checkpoint / _CHECKSUMS) == _sums(checkpoint))
    except (ArtefactError, OSError):
        return False


def _sums(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _CHECKSUMS)
    return {str(path.relative_to(folder)): file_checksum(path) for path in files}
