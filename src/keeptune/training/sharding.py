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
from keeptune.core.processes import world
from keeptune.training.losses.base import TaskLoss

_BOTH = "DDP, FSDP2, or DeepSpeed's ZeRO-1 and ZeRO-2"
_FSDP2 = "Set `fsdp_version: 2` and no DeepSpeed in the configuration of accelerate."


def shards(config: Any) -> bool:
    """Returns whether a training divides the model's weights among the processes, by the launcher or the config."""
    return _asks("FSDP") or bool(config.fsdp)


def shard_anywhere(config: Any) -> None:
    """Has accelerate shard on the CPU too: it does so on accelerators only, of which FSDP2 itself needs none."""
    if shards(config) and PartialState().distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def refuse_launcher(task: str, examples: int, loss: TaskLoss | None, device: str, device_map: Any) -> None:
    """Refuses what a launcher asks for and cannot be trained exactly, before anything is loaded.

    Args:
        task: Its kind.
        examples: How many it has.
        loss: What is learned of each token; None for nll.
        device: Where it is trained.
        device_map: The recipe's, which divides the layers among devices itself; else None.

    Raises:
        RecipeError: It is refused, with the reason and what to do.
    """
    if world() == 1:
        return
    reads_start = f"task.loss {loss.name}" if loss is not None and loss.reads != "log_probs" else None
    if task.endswith("preference"):
        reads_start = f"task.kind {task}"
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
            device_map is not None,
            "several processes, and `device_map`, by which one process divides the layers among all devices",
            "one of the two",
            "Leave `device_map` out, or start one process.",
        ),
        (
            world() > examples,
            f"{world()} processes for {examples} examples of the task",
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
