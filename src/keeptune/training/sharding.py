"""What a launcher asks for by its environment: weights in shards, on any device."""

from __future__ import annotations

import os
from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType


def shards(config: Any) -> bool:
    """Returns whether a training divides the model's weights among the processes, by the launcher or the config."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true" or bool(config.fsdp)


def shard_anywhere(config: Any) -> None:
    """Has accelerate shard on the CPU too: it does so on accelerators only, of which FSDP2 itself needs none."""
    if shards(config) and PartialState().distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
