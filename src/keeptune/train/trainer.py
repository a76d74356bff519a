"""Training with TRL's SFTTrainer: checkpoints, resume after a kill, frozen factors checked at the start."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from trl import SFTConfig, SFTTrainer

from keeptune.adapter.install import check_frozen
from keeptune.core.artefact import explain_full_disk
from keeptune.core.errors import RecipeError, TrainError, nearest
from keeptune.core.plan import Plan
from keeptune.data.sft import TaskExamples

__all__ = ["Guard", "last_complete_checkpoint", "sft_config", "train"]

_log = logging.getLogger(__name__)
_OURS = {"output_dir": "output", "resume_from_checkpoint": "output", "completion_only_loss": "task"}


class Guard(TrainerCallback):
    """Checks what must hold while training; add it to your own trainer too.

    At the start: exactly the factors that the plan trains are trainable. While training: the loss is finite.

    Args:
        plan: The plan that was installed.
    """

    def __init__(self, plan: Plan) -> None:
        """Remember the plan."""
        self.plan = plan

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check the frozen factors, after any checkpoint was loaded.

        Args:
            args: The trainer's arguments.
            state: The trainer's state.
            control: The trainer's control.
            **kwargs: Holds the model.

        Raises:
            TrainError: A frozen factor is trainable or the other way round.
        """
        if isinstance(kwargs["model"], PeftModel):
            check_frozen(kwargs["model"], self.plan)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Stop at a loss that is not finite.

        Args:
            args: The trainer's arguments.
            state: The trainer's state.
            control: The trainer's control.
            **kwargs: Holds the logs.

        Raises:
            TrainError: The loss is NaN or infinite.
        """
        loss = kwargs["logs"].get("loss", 0.0)
        if not math.isfinite(loss):
            raise TrainError(
                f"training step {state.global_step}",
                got=f"loss {loss}",
                wanted="a finite loss",
                next_step="Lower train.learning_rate, or train in float32 or bfloat16.",
            )


def sft_config(arguments: Mapping[str, Any], folder: Path, *, dtype: torch.dtype, device: str) -> SFTConfig:
    """Turn the recipe's ``train`` section into TRL's config.

    Defaults that differ from TRL's: mixed precision follows the base's dtype, no activation checkpointing,
    a checkpoint every tenth of the training (the last two are kept), no tracker.

    Args:
        arguments: Any fields of ``SFTConfig`` (all of ``TrainingArguments`` among them).
        folder: Where checkpoints go.
        dtype: The base model's dtype.
        device: ``"cpu"`` or a CUDA device.

    Returns:
        The config.

    Raises:
        RecipeError: A field does not exist, is keeptune's own, or has a wrong value.
    """
    known = {field.name for field in dataclasses.fields(SFTConfig) if field.init}
    for key in arguments:
        if key in _OURS or key not in known:
            raise RecipeError(
                f"train.{key}",
                got="a key that keeptune sets itself" if key in _OURS else "an unknown key",
                wanted="a field of TRL's SFTConfig or Transformers' TrainingArguments",
                next_step=f"Use `{_OURS[key]}` instead." if key in _OURS else nearest(key, known).split(" Known")[0],
            )
    quiet = not sys.stderr.isatty()
    defaults = {
        "bf16": dtype == torch.bfloat16 and "fp16" not in arguments,
        "fp16": dtype == torch.float16 and "bf16" not in arguments,
        "logging_steps": 0.02,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": 0.1,
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": quiet,
        "use_cpu": device == "cpu",
        "dataloader_pin_memory": device != "cpu",
    }
    if not {"gradient_checkpointing", "activation_checkpointing"} & arguments.keys():
        defaults["activation_checkpointing"] = False
    try:
        return SFTConfig(**{**defaults, **arguments}, output_dir=str(folder))
    except (TypeError, ValueError) as error:
        raise RecipeError(
            "train", got=str(error), wanted="values that SFTConfig takes", next_step="Correct the recipe."
        ) from error


def last_complete_checkpoint(folder: Path) -> Path | None:
    """Find the newest checkpoint that was written to its end; half-written ones are removed.

    ``trainer_state.json`` is the last file that ``Trainer`` writes of a checkpoint.

    Args:
        folder: Where checkpoints are.

    Returns:
        The checkpoint's folder, or None.
    """
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: -int(path.name.rpartition("-")[2]))
    for path in found:
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            _log.warning("training: %s was not written to its end and is removed", path)
            shutil.rmtree(path)
        else:
            return path
    return None


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
        The loss curve: ``{"step": .., "loss": .., "learning_rate": ..}`` per logged step, nats per token.

    Raises:
        TrainError: A frozen factor would be trained, or the loss is not finite.
        ArtefactError: The disk is full.
    """
    folder = Path(config.output_dir)
    resume = last_complete_checkpoint(folder)
    if resume is not None:
        _log.info("training: going on from %s", resume)
    trainer = SFTTrainer(
        model=model,
        args=config,
        train_dataset=examples.dataset(),
        processing_class=tokenizer,
        callbacks=[Guard(plan)],
    )
    trainer.remove_callback(PrinterCallback)
    with explain_full_disk(folder):
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return [
        {"step": row["step"], "loss": row["loss"], "learning_rate": row["learning_rate"]}
        for row in trainer.state.log_history
        if "loss" in row
    ]
