"""The recipe's ``train`` section as the config of a trainer, checked."""

import dataclasses
import functools
import operator
import re
import sys
import types
import typing
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
from accelerate.utils import patch_environment
from huggingface_hub import get_token
from pydantic import Field, TypeAdapter, ValidationError
from transformers import PreTrainedTokenizerBase, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from trl import DPOConfig, KTOConfig, SFTConfig

from keeptune.core.errors import RecipeError, named, nearest, need_known
from keeptune.training.sharding import asks
from keeptune.training.zero import refuse_zero

# Of each kind of task the config of its trainer; of those that are not here TrainingArguments.
CONFIGS: Mapping[str, type[Any]] = {"completion": SFTConfig, "preference": DPOConfig, "unpaired_preference": KTOConfig}
_OURS = {
    "output_dir": "Use `output` instead.",
    "resume_from_checkpoint": "Use `output` instead.",
    "completion_only_loss": "Use `task` instead.",
    "assistant_only_loss": "Use `task.roles_to_train` instead.",
    "hub_token": "Log in with `hf auth login`, or set HF_TOKEN in the environment.",
    "chat_template_path": "Use `task.chat_template` instead.",
    **dict.fromkeys(("precompute_ref_log_probs", "sync_ref_model"), "Leave it out: the reference is the base."),
}
_PLAIN = "a field of Transformers' TrainingArguments, or max_length"
_SCALARS = {int, float, bool, str, type(None)}
_SEEDS: Mapping[str, Any] = {"ge": 0, "le": 2**32 - 1}  # NumPy's
_LIMITS: Mapping[str, Mapping[str, Any]] = {
    **dict.fromkeys(("learning_rate", "logging_steps", "save_steps"), {"ge": 0}),
    **dict.fromkeys(("per_device_train_batch_size", "gradient_accumulation_steps", "max_length"), {"ge": 1}),
    **dict.fromkeys(("beta", "desirable_weight", "undesirable_weight"), {"gt": 0}),
    "label_smoothing": {"ge": 0, "le": 0.5},
    "ld_alpha": {"ge": 0, "le": 1},
}
_WORDS = ("loss_type", "f_divergence_type")  # of TRL's preference trainers, which check them at the first step


def check_arguments(arguments: Mapping[str, Any], kind: type[TrainingArguments] = SFTConfig) -> dict[str, Any]:
    """Returns the recipe's ``train`` section with numbers as numbers (``"1e-4"`` in quotes is one), checked.

    Args:
        arguments: Any fields of the config (all of ``TrainingArguments`` among them).
        kind: The config; ``TrainingArguments`` allows its own fields and ``max_length`` only, as for a classifier.

    Raises:
        RecipeError: A field does not exist, is keeptune's own, or has a wrong value.
    """
    pairs_up = kind is KTOConfig and arguments.get("loss_type", "kto") == "kto"  # with the answers of its batch
    limits = {**_LIMITS, "per_device_train_batch_size": {"ge": 2}} if pairs_up else _LIMITS
    hints = typing.get_type_hints(SFTConfig) | typing.get_type_hints(kind)
    own = kind is not TrainingArguments
    wanted = f"a field of TRL's {kind.__name__} or Transformers' TrainingArguments" if own else _PLAIN
    known = {field.name for field in dataclasses.fields(kind) if field.init} | {"max_length"}
    checked = {}
    for key, value in arguments.items():
        where = f"train.{key}"
        if key in _OURS:
            raise RecipeError(where, got="a key that keeptune sets itself", wanted=wanted, next_step=_OURS[key])
        if key not in known:
            hint = nearest(str(key), known).split(" Known")[0]
            raise RecipeError(where, got="an unknown key", wanted=wanted, next_step=hint)
        if key in _WORDS and kind is not SFTConfig:
            _check_words(where, value, kind)
        checked[key] = _check_value(key, value, hints[key], limits.get(key))
    return checked


def _check_words(where: str, value: Any, kind: type[Any]) -> None:
    """Refuses a word that is none of a field's, which TRL lists in the field's choices or in its help."""
    field = next(field for field in dataclasses.fields(kind) if where.endswith(f".{field.name}"))
    listed = field.metadata["help"].partition("Possible values are:")[2].partition(". ")[0]
    known = field.metadata.get("choices") or re.findall(r"`'?(\w+)'?`", listed)
    for word in value if isinstance(value, list) else [value]:
        need_known(word, known, where, "one that TRL has")


def _check_value(key: str, value: Any, hint: Any, limits: Mapping[str, Any] | None) -> Any:
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if not _SCALARS.issuperset(kinds):
        return value
    bounds = Field(**(_SEEDS if key.endswith("seed") else limits or {}), allow_inf_nan=False)
    hint = functools.reduce(operator.or_, (Annotated[one, bounds] if one in (int, float) else one for one in kinds))
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
    arguments: Mapping[str, Any],
    folder: Path,
    *,
    dtype: torch.dtype,
    device: str,
    positions: int | None = None,
    kind: type[Any] = SFTConfig,
) -> Any:
    """Returns TRL's config of the recipe's ``train`` section, of a ``kind``, with ``folder`` for checkpoints.

    Defaults that differ from TRL's: mixed precision follows the base's dtype, no activation checkpointing,
    a checkpoint every tenth of the training (the last two are kept), no tracker; examples are cut to the positions
    that the base has, and to 1,024 tokens.

    Raises:
        RecipeError: A field does not exist, is keeptune's own, or has a wrong value.
        TrainError: DeepSpeed cannot be exact with it, as of :func:`keeptune.training.zero.refuse_zero`.
    """
    checked = check_arguments(arguments, kind)
    _check_surroundings(checked, positions)
    defaults = {
        "bf16": dtype == torch.bfloat16 and "fp16" not in checked,
        "fp16": dtype == torch.float16 and "bf16" not in checked,
        "logging_steps": 0.02,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": 0.1,
        "save_total_limit": 2,
        "eval_steps": 0.1,
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
        with patch_environment(ACCELERATE_MIXED_PRECISION="no"):  # the recipe says it, not a launcher
            made = kind(**{**defaults, **checked}, output_dir=str(folder))
    except PackageNotFoundError as error:
        raise _missing("deepspeed", "what a launcher or the recipe asks for", "deepspeed") from error
    except (TypeError, ValueError) as error:
        raise RecipeError(
            "train", got=str(error), wanted=f"values that {kind.__name__} takes", next_step="Correct the recipe."
        ) from error
    refuse_zero(made)
    if made.eval_strategy != "no" and (asks("FSDP") or asks("DEEPSPEED")):
        raise RecipeError(
            "train.eval_strategy",
            got=f"{made.eval_strategy.value} with a model in shards",
            wanted="a whole model on each device: benchmarks are divided among processes",
            next_step="Leave it out (and stop_at_loss), or launch without FSDP and DeepSpeed.",
        )
    return made


def with_tokens(tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """Gives a tokenizer the recipe's ``eos_token`` and ``pad_token``, before any data are read: TRL does it later.

    Raises:
        RecipeError: It has no such token.
    """
    for key in ("eos_token", "pad_token"):
        token = arguments.get(key)
        if token is not None and token not in tokenizer.get_vocab():
            known, wanted = tokenizer.all_special_tokens, "a token of the tokenizer"
            raise RecipeError(f"train.{key}", got=str(token), wanted=wanted, next_step=f"Such as {named(known)}.")
        setattr(tokenizer, key, token or getattr(tokenizer, key))
    return tokenizer


def divide_step(config: Any, processes: int) -> Any:
    """Returns a config for each of several processes: fewer micro-batches or smaller ones, and the same step in all.

    Raises:
        RecipeError: The examples of a step are no multiple of the processes.
    """
    rows = config.per_device_train_batch_size
    step = rows * config.gradient_accumulation_steps
    if step % processes:
        raise RecipeError(
            "train.per_device_train_batch_size, train.gradient_accumulation_steps",
            got=f"steps of {step} examples for {processes} processes",
            wanted="a multiple of the processes: a step is that of one process, divided",
            next_step="Change one of the two, or the number of processes.",
        )
    each = step // processes
    config.per_device_train_batch_size = max(n for n in range(1, min(rows, each) + 1) if each % n == 0)
    config.gradient_accumulation_steps = each // config.per_device_train_batch_size
    return config


def example_length(config: Any) -> int | None:
    """Returns the tokens that an example is cut to; None where TRL cuts the packed examples itself."""
    split = getattr(config, "packing", False) and config.packing_strategy != "bfd"
    return None if split else config.max_length


def _check_surroundings(checked: Mapping[str, Any], positions: int | None) -> None:
    """Refuses what the base has no positions for, and what needs a package or a login that is not there."""
    length = checked.get("max_length")
    if length is not None and positions is not None and length > positions:
        raise RecipeError(
            "train.max_length",
            got=str(length),
            wanted=f"at most {positions}, the positions that the base has for tokens",
            next_step="Lower it, or set it to null (in Python None) for as many as there are.",
        )
    named = checked.get("report_to") or ()
    for tracker in [named] if isinstance(named, str) else named:
        need_known(tracker, ["none", "all", *INTEGRATION_TO_CALLBACK], "train.report_to", "trackers of Transformers")
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
