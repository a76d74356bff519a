"""The recipe's ``train`` section as the config of a trainer, checked."""

from __future__ import annotations

import dataclasses
import sys
import types
import typing
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
from huggingface_hub import get_token
from pydantic import Field, TypeAdapter, ValidationError
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from trl import SFTConfig

from keeptune.core.errors import RecipeError, nearest

_OURS = {"output_dir": "output", "resume_from_checkpoint": "output", "completion_only_loss": "task"}
_WANTED = {
    True: "a field of TRL's SFTConfig or Transformers' TrainingArguments",
    False: "a field of Transformers' TrainingArguments, or max_length",
}
_SCALARS = {int, float, bool, str, type(None)}
_SEEDS = 2**32 - 1  # NumPy's
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
    """Returns the recipe's ``train`` section with numbers as numbers (``"1e-4"`` in quotes is one), checked.

    Args:
        arguments: Any fields of ``SFTConfig`` (all of ``TrainingArguments`` among them).
        kind: ``TrainingArguments`` allows its own fields and ``max_length`` only, as for a classifier.

    Raises:
        RecipeError: A field does not exist, is keeptune's own, or has a wrong value.
    """
    hints = typing.get_type_hints(SFTConfig)
    known = {field.name for field in dataclasses.fields(kind) if field.init} | {"max_length"}
    checked = {}
    for key, value in arguments.items():
        where = f"train.{key}"
        if key in _OURS:
            raise RecipeError(
                where,
                got="a key that keeptune sets itself",
                wanted=_WANTED[kind is SFTConfig],
                next_step=f"Use `{_OURS[key]}` instead.",
            )
        if key in ("hub_token", "push_to_hub_token") and value is not None:
            raise RecipeError(
                where,
                got="a secret",
                wanted="none: recipes are copied into records, cards and reports",
                next_step="Log in with `hf auth login`, or set HF_TOKEN in the environment.",
            )
        if key not in known:
            hint = nearest(str(key), known).split(" Known")[0]
            raise RecipeError(where, got="an unknown key", wanted=_WANTED[kind is SFTConfig], next_step=hint)
        checked[key] = _check_value(key, value, hints[key])
    return checked


def _check_value(key: str, value: Any, hint: Any) -> Any:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if not _SCALARS.issuperset(kinds):
        return value
    if key in _LEAST:
        most = _SEEDS if key.endswith("seed") else None
        hint = Annotated[hint, Field(ge=_LEAST[key], le=most, allow_inf_nan=False)]
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        raise RecipeError(
            f"train.{key}",
            got=repr(value),
            wanted=error.errors()[0]["msg"].removeprefix("Input should be "),
            next_step="Correct the value.",
        ) from error


def sft_config(
    arguments: Mapping[str, Any], folder: Path, *, dtype: torch.dtype, device: str, positions: int | None = None
) -> SFTConfig:
    """Returns TRL's config of the recipe's ``train`` section, with ``folder`` for checkpoints.

    Defaults that differ from TRL's: mixed precision follows the base's dtype, no activation checkpointing,
    a checkpoint every tenth of the training (the last two are kept), no tracker; examples are cut to the positions
    that the base has, and to 1,024 tokens.

    Raises:
        RecipeError: A field does not exist, is keeptune's own, or has a wrong value.
    """
    checked = check_arguments(arguments)
    _check_surroundings(checked, positions)
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
        "max_length": positions if "max_length" in checked else min(1024, positions or 1024),
    }
    if checked.get("max_length", 0) is None:  # whole texts, as far as there are positions
        del checked["max_length"]
    if device == "cpu" and checked.get("fp16"):
        raise RecipeError(
            "train.fp16",
            got="true on a CPU, where Transformers ignores it",
            wanted="bf16, or float32",
            next_step="Set `train: {bf16: true}`, or leave fp16 out.",
        )
    if not {"gradient_checkpointing", "activation_checkpointing"} & checked.keys():
        defaults["activation_checkpointing"] = False
    try:
        return SFTConfig(**{**defaults, **checked}, output_dir=str(folder))
    except (TypeError, ValueError) as error:
        raise RecipeError(
            "train", got=str(error), wanted="values that SFTConfig takes", next_step="Correct the recipe."
        ) from error


def example_length(config: SFTConfig) -> int | None:
    """Returns the tokens that an example is cut to; None where TRL cuts the packed examples itself."""
    split = config.packing and config.packing_strategy != "bfd"
    return None if split else config.max_length


def _check_surroundings(checked: Mapping[str, Any], positions: int | None) -> None:
    """Refuses what the base has no positions for, and what needs a package or a login that is not there."""
    length = checked.get("max_length")
    if length is not None and positions is not None and length > positions:
        raise RecipeError(
            "train.max_length",
            got=str(length),
            wanted=f"at most {positions}, the positions that the base has for tokens",
            next_step="Lower it, or set it to null for as many as there are.",
        )
    named = checked.get("report_to") or ()
    for tracker in [named] if isinstance(named, str) else named:
        if tracker not in ("none", "all", *get_available_reporting_integrations()):
            raise _missing("report_to", tracker, tracker)
    optimizer = str(checked.get("optim", ""))
    if any(part in optimizer for part in ("8bit", "paged", "bnb")) and not find_spec("bitsandbytes"):
        raise _missing("optim", optimizer, "bitsandbytes")
    if checked.get("push_to_hub") and get_token() is None:
        raise RecipeError(
            "train.push_to_hub",
            got="true without a login",
            wanted="an access token of the hub",
            next_step="Log in with `hf auth login`, set HF_TOKEN, or leave push_to_hub out.",
        )


def _missing(key: str, value: str, package: str) -> RecipeError:
    return RecipeError(
        f"train.{key}",
        got=f"{value}, which needs a package that is not installed",
        wanted="what is installed here",
        next_step=f"Run `pip install {package}`, or leave {key} out.",
    )
