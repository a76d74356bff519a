"""Training with TRL's SFTTrainer: checkpoints, resume after a kill, frozen factors checked at the start."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
import sys
import types
import typing
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from keeptune.adapter.special_layers import biases_are_no_shards
from keeptune.core.artefact import explain_full_disk
from keeptune.core.errors import DataError, RecipeError, TrainError, nearest
from keeptune.core.plan import Plan
from keeptune.data.completions import TaskExamples
from keeptune.training.attach import attach

__all__ = ["check_arguments", "fit", "last_complete_checkpoint", "sft_config", "train"]

_log = logging.getLogger(__name__)
_OURS = {"output_dir": "output", "resume_from_checkpoint": "output", "completion_only_loss": "task"}
_SCALARS = {int, float, bool, str, type(None)}
_LEAST = {
    "seed": 0,
    "learning_rate": 0,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "logging_steps": 0,
    "save_steps": 0,
    "max_length": 1,
}


def check_arguments(arguments: Mapping[str, Any], kind: type[TrainingArguments] = SFTConfig) -> dict[str, Any]:
    """Check the names and the plain values of the recipe's ``train`` section.

    Args:
        arguments: Any fields of ``SFTConfig`` (all of ``TrainingArguments`` among them).
        kind: ``TrainingArguments`` allows its own fields and ``max_length`` only, as for a classifier.

    Returns:
        The section with numbers as numbers: ``"1e-4"`` in quotes is one too.

    Raises:
        RecipeError: A field does not exist, is keeptune's own, or has a wrong value.
    """
    hints = typing.get_type_hints(SFTConfig)
    known = {field.name for field in dataclasses.fields(kind) if field.init} | {"max_length"}
    checked = {}
    for key, value in arguments.items():
        if key in _OURS or key not in known:
            raise RecipeError(
                f"train.{key}",
                got="a key that keeptune sets itself" if key in _OURS else "an unknown key",
                wanted="a field of TRL's SFTConfig or Transformers' TrainingArguments"
                if kind is SFTConfig
                else "a field of Transformers' TrainingArguments, or max_length",
                next_step=f"Use `{_OURS[key]}` instead."
                if key in _OURS
                else nearest(str(key), known).split(" Known")[0],
            )
        checked[key] = _check_value(key, value, hints[key])
    return checked


def _check_value(key: str, value: Any, hint: Any) -> Any:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if not _SCALARS.issuperset(kinds):
        return value
    try:
        value = TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        raise RecipeError(
            f"train.{key}", got=repr(value), wanted=error.errors()[0]["msg"], next_step="Correct the value."
        ) from error
    least = _LEAST.get(key)
    if least is not None and value is not None and not least <= value < math.inf:
        raise RecipeError(
            f"train.{key}", got=str(value), wanted=f"a number of at least {least}", next_step="Correct the value."
        )
    return value


def sft_config(
    arguments: Mapping[str, Any], folder: Path, *, dtype: torch.dtype, device: str, positions: int | None = None
) -> SFTConfig:
    """Turn the recipe's ``train`` section into TRL's config.

    Defaults that differ from TRL's: mixed precision follows the base's dtype, no activation checkpointing,
    a checkpoint every tenth of the training (the last two are kept), no tracker.

    Args:
        arguments: Any fields of ``SFTConfig`` (all of ``TrainingArguments`` among them).
        folder: Where checkpoints go.
        dtype: The base model's dtype.
        device: ``"cpu"`` or a CUDA device.
        positions: How many positions the base has; examples are cut to it, and to 1,024 tokens, unless
            ``max_length`` says otherwise.

    Returns:
        The config.

    Raises:
        RecipeError: A field does not exist, is keeptune's own, or has a wrong value.
    """
    checked = check_arguments(arguments)
    defaults = {
        "bf16": dtype == torch.bfloat16 and "fp16" not in checked,
        "fp16": dtype == torch.float16 and "bf16" not in checked,
        "logging_steps": 0.02,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": 0.1,
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": not sys.stderr.isatty(),
        "use_cpu": device == "cpu",
        "dataloader_pin_memory": device != "cpu",
        "max_length": min(1024, positions or 1024),
    }
    if not {"gradient_checkpointing", "activation_checkpointing"} & checked.keys():
        defaults["activation_checkpointing"] = False
    try:
        return SFTConfig(**{**defaults, **checked}, output_dir=str(folder))
    except (TypeError, ValueError) as error:
        raise RecipeError(
            "train", got=str(error), wanted="values that SFTConfig takes", next_step="Correct the recipe."
        ) from error


def last_complete_checkpoint(folder: Path) -> Path | None:
    """Find the newest checkpoint that a run can go on from; newer ones that are not whole are removed.

    ``trainer_state.json`` is the last file that ``Trainer`` writes of a checkpoint. One without the states of
    the random numbers (``save_only_model``) cannot be gone on from.

    Args:
        folder: Where checkpoints are.

    Returns:
        The checkpoint's folder, or None.
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


def train(
    model: PreTrainedModel | PeftModel,
    plan: Plan,
    tokenizer: PreTrainedTokenizerBase,
    examples: TaskExamples,
    config: SFTConfig,
) -> list[dict[str, float]]:
    """Train an installed model on prompts and completions, going on from the last checkpoint if there is one.

    Args:
        model: From :func:`keeptune.adapter.install.install`; trained in place.
        plan: The plan that was installed.
        tokenizer: The tokenizer.
        examples: The task.
        config: From :func:`sft_config`; its ``output_dir`` holds the checkpoints.

    Returns:
        The loss curve: ``{"step": .., "loss": .., "learning_rate": ..}`` per logged step, nats per token, without
        any penalty; those are told apart, with the drift of each layer.

    Raises:
        TrainError: A frozen factor would be trained, the loss is not finite, or TRL cannot train with these
            arguments.
        DataError: No example has a completion within ``max_length``.
        ArtefactError: The disk is full.
    """
    return fit(lambda: _trainer(model, plan, tokenizer, examples, config), Path(config.output_dir))


def fit(make: Callable[[], Any], folder: Path) -> list[dict[str, float]]:
    """Run a trainer from the last checkpoint that is whole, or from the start.

    Args:
        make: Makes the trainer.
        folder: Where its checkpoints are.

    Returns:
        The loss curve: ``{"step": .., "loss": .., "learning_rate": ..}`` per logged step.

    Raises:
        ArtefactError: The disk is full.
    """
    resume = last_complete_checkpoint(folder)
    if resume is not None:
        _log.info("training: going on from %s", resume)
    trainer = make()
    with explain_full_disk(folder), biases_are_no_shards():
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return [_point(row) for row in trainer.state.log_history if "loss" in row]


def _point(row: Mapping[str, float]) -> dict[str, float]:
    kept = ("step", "loss", "learning_rate", "penalty", "penalty_grad_norm")
    return {key: row[key] for key in kept if key in row} | {
        key: value
        for key, value in row.items()
        if key.startswith(("penalty/", "drift/", "feature_drift", "multiplier"))
    }


def _trainer(
    model: PreTrainedModel | PeftModel,
    plan: Plan,
    tokenizer: PreTrainedTokenizerBase,
    examples: TaskExamples,
    config: SFTConfig,
) -> Any:
    folder = Path(config.output_dir)
    try:
        with explain_full_disk(folder):
            trainer = SFTTrainer(
                model=model,
                args=config,
                train_dataset=examples.dataset(tokenizer, config.max_length)[0],
                processing_class=tokenizer,
            )
    except (TypeError, ValueError) as error:
        raise TrainError(
            "train", got=str(error), wanted="arguments that TRL's SFTTrainer can train with", next_step="Correct them."
        ) from error
    attach(trainer, plan)
    trainer.remove_callback(PrinterCallback)
    _report_cuts(len(examples.prompts), len(trainer.train_dataset), config)
    return trainer


def _report_cuts(given: int, kept: int, config: SFTConfig) -> None:
    """Tell about examples that TRL left out because cutting them to ``max_length`` cut off the completion."""
    if kept == 0:
        raise DataError(
            "task.train",
            got=f"{given} examples, all with prompts of train.max_length ({config.max_length}) tokens or more",
            wanted="room for completions",
            next_step="Raise train.max_length or shorten the prompts.",
        )
    if kept < given and not config.packing:
        _log.warning(
            "training: %d of %d examples are left out: their prompts alone fill train.max_length (%d tokens)",
            given - kept,
            given,
            config.max_length,
        )
