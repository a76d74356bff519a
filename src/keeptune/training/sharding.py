"""What a launcher asks for by its environment: weights in shards, on any device, and what is refused of it."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType

from keeptune.core.errors import RecipeError
from keeptune.core.processes import launched

_BOTH = "DDP, FSDP2, or DeepSpeed's ZeRO-1 and ZeRO-2"
_FSDP2 = "Set `fsdp_version: 2` and no DeepSpeed in the configuration of accelerate."


def shards(config: Any) -> bool:
    """Returns whether a training divides the model's weights among the processes, by the launcher or the config."""
    return _asks("FSDP") or bool(config.fsdp)


def shard_anywhere(config: Any) -> None:
    """Has accelerate shard on the CPU too: it does so on accelerators only, of which FSDP2 itself needs none."""
    if shards(config) and PartialState().distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def refuse_launcher(examples: int, device: str, *, reads_start: str | None, quantised: bool) -> None:
    """Refuses what a launcher asks for and cannot be trained exactly, before anything is loaded.

    Args:
        examples: How many the task has.
        device: Where it is trained.
        reads_start: What of the task runs the model as it started beside the one in training, if anything.
        quantised: Whether the base stays quantised.

    Raises:
        RecipeError: It is refused, with the reason and what to do.
    """
    if launched() == 1:
        return
    fsdp, stage = _asks("FSDP"), _stage() if _asks("DEEPSPEED") else None
    for refused, got, wanted, next_step in (
        (
            fsdp and os.environ.get("FSDP_VERSION", "1") != "2",
            "FSDP 1, which flattens the factors of several modules into one tensor",
            "FSDP2",
            "Set `fsdp_version: 2` in the configuration of accelerate.",
        ),
        (
            stage not in (None, 1, 2),
            f"DeepSpeed's ZeRO-{stage}, where no process holds the factors that penalties and exports are of",
            _BOTH,
            _FSDP2,
        ),
        (
            stage is not None and device == "cpu",
            "DeepSpeed on a CPU, where accelerate leaves it out without a word",
            "DDP or FSDP2",
            _FSDP2,
        ),
        (
            stage is not None and not find_spec("deepspeed"),
            "DeepSpeed, which is not installed",
            _BOTH,
            "Run `pip install deepspeed`, or use FSDP2.",
        ),
        (
            (fsdp or stage is not None) and reads_start is not None,
            f"{reads_start}, which runs the model as it started, with weights in shards or DeepSpeed's engine",
            "DDP or a single process",
            "Launch it without FSDP and DeepSpeed (`multi_gpu`), or take another loss.",
        ),
        (
            fsdp and quantised,
            "a quantised base under FSDP2, of which accelerate shards no packed weights",
            "DDP, where each process holds the base",
            "Launch it without FSDP (`multi_gpu`), or leave `quantization` out.",
        ),
        (
            launched() > examples,
            f"{launched()} processes for {examples} examples of the task",
            "at least one example for each process",
            f"Start at most {examples} processes.",
        ),
    ):
        if refused:
            raise RecipeError("launcher", got=got, wanted=wanted, next_step=next_step)


def _asks(engine: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true"


def _stage() -> int:
    """Returns the stage of ZeRO that accelerate was told of, in its own configuration or in a file of DeepSpeed's."""
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if file and Path(file).is_file():
        return int(json.loads(Path(file).read_text()).get("zero_optimization", {}).get("stage", 0))
    return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2))
