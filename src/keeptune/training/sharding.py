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

_FSDP2 = "Launch it by `keeptune launch --sharding fsdp2` (in accelerate's configuration: `fsdp_version: 2`)."
_DDP = "Launch it by `keeptune launch --sharding multi_gpu`, or take another loss."


def shard_anywhere(config: Any) -> None:
    """Has accelerate shard on the CPU too: it does so on accelerators only, of which FSDP2 itself needs none."""
    if (_asks("FSDP") or config.fsdp) and PartialState().distributed_type == DistributedType.MULTI_CPU:
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
    fsdp, zero = _asks("FSDP"), _stage() if _asks("DEEPSPEED") else None
    engine = "FSDP2" if fsdp else f"DeepSpeed's ZeRO-{zero}"
    judged = task.endswith("preference")
    both = judged or (loss is not None and loss.reads != "log_probs")
    old = fsdp and os.environ.get("FSDP_VERSION", "1") != "2"
    what = f"task.kind {task}" if judged else f"task.loss {loss and loss.name}"
    for refused, got, next_step in (
        (old, "FSDP 1, which flattens the factors of several modules into one tensor", _FSDP2),
        (zero not in (None, 1, 2), f"{engine}, where no process holds the factors that penalties are of", _FSDP2),
        (zero and device == "cpu", "DeepSpeed on a CPU, where accelerate leaves it out without a word", _FSDP2),
        (zero and not find_spec("deepspeed"), "DeepSpeed, which is not installed", "Run `pip install deepspeed`."),
        ((fsdp or zero) and both, f"{what} under {engine}: it runs the model as it started too", _DDP),
        (device_map is not None, f"`device_map` with {world()} processes", "Leave it out, or start one process."),
        (world() > examples, f"{world()} processes for {examples} examples", f"Start at most {examples}."),
    ):
        if refused:
            wanted = "what takes the steps of one process: DDP, FSDP2, ZeRO-1 or ZeRO-2 on whole examples"
            raise RecipeError("launcher", got=got, wanted=wanted, next_step=next_step)


def _asks(engine: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true"


def _stage() -> int:
    """Returns the stage of ZeRO that accelerate was told of, in its own configuration or in a file of DeepSpeed's."""
    file = os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE")
    if file and Path(file).is_file():
        return int(json.loads(Path(file).read_text()).get("zero_optimization", {}).get("stage", 0))
    return int(os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2))
