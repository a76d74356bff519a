"""What a run needs of the machine: folders, device, the user's store, and how much of a model is in memory."""

from __future__ import annotations

import ctypes
import gc
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import platformdirs
import psutil  # type: ignore[import-untyped]
import torch
from transformers import PreTrainedModel

from keeptune.core.errors import ModelError, RecipeError
from keeptune.core.offload import is_offloaded
from keeptune.core.processes import gathered, on_machine, world
from keeptune.core.target import Target
from keeptune.model.blocks import blocks_of
from keeptune.model.blockwise import BlockwiseRunner
from keeptune.model.gguf import is_gguf
from keeptune.model.pretrained import LoadOptions, load_config, load_model, load_offloaded, load_shapes
from keeptune.model.quantization import stored_quantization
from keeptune.model.runner import Runner
from keeptune.statistics.request import Request, RowRequest
from keeptune.statistics.store import DEFAULT_LIMIT, StatStore
from keeptune.statistics.store_use import recorded

_log = logging.getLogger(__name__)
Memory = Literal["resident", "blockwise", "auto"]
_SHARE = 0.8  # of the free memory: the rest is for activations
_SMALL = 2**27  # bytes of a model that are not worth a search for cycles


def free_bytes(device: torch.device) -> int:
    """Returns how much memory of a device is free; of the CPU, the host's, which its processes share.

    Of several processes it is the least, so that all decide alike.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = int(torch.cuda.mem_get_info(device)[0]) + cached
    else:
        free = int(psutil.virtual_memory().available) // on_machine()[1]
    return min(gathered(free))


def is_packed(name: str, options: LoadOptions) -> bool:
    """Returns whether a base is quantised, by the recipe or as it is stored, or a GGUF file."""
    return bool(options.quantization) or is_gguf(name) or stored_quantization(load_config(name, options)) is not None


def load_base(name: str, options: LoadOptions, memory: Memory) -> PreTrainedModel:
    """Loads a base for statistics and plans: whole, or with its weights on disk until a block needs them.

    Quantised bases are loaded whole, under ``"blockwise"`` on the CPU, from where their blocks move to the device.

    Raises:
        ModelError: As of ``load_model``.
    """
    if is_packed(name, options):
        return load_model(name, replace(options, device="cpu") if memory == "blockwise" else options)
    if memory == "auto":
        device = torch.device(options.device)
        needed, free = sum(p.nbytes for p in load_shapes(name, options).parameters()), free_bytes(device)
        memory = "resident" if needed <= _SHARE * free else "blockwise"
        _tell("plan", memory, "weights", needed, free, device)
    return load_model(name, options) if memory == "resident" else load_offloaded(name, options)


def placed_runner(
    runner: Runner, requests: Mapping[Target, frozenset[Request]], memory: Memory, device: str | None
) -> tuple[Runner, int | None]:
    """Returns what passes data through the model, and how many bytes sums may take at a time (None: those of a pass).

    Raises:
        RecipeError: ``memory`` is none of the three.
    """
    if memory not in ("resident", "blockwise", "auto"):
        raise RecipeError(
            "memory", got=str(memory), wanted="resident, blockwise or auto", next_step="Take one of them."
        )
    sites = {(r, r.site(t)): r.numbers(t) for t, own in requests.items() for r in own if isinstance(r, RowRequest)}
    sums, free = 8 * sum(sites.values()), free_bytes(runner.device)
    room = int(_SHARE * free)
    if memory == "auto" and sites:
        memory = "blockwise" if (is_offloaded(runner.model) or sums > room) and _is_stack(runner.model) else "resident"
        _tell("statistics", memory, "sums", sums, free, runner.device)
    if memory != "blockwise":
        return runner, room if sums > room else None
    place = None if device is None else torch.device(device)
    return (runner if isinstance(runner, BlockwiseRunner) else BlockwiseRunner(runner.model, place)), None


def _tell(stage: str, memory: Memory, what: str, needed: int, free: int, device: torch.device) -> None:
    sizes = f"{what} of {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB free"
    _log.info("%s: memory auto takes %s: %s on %s", stage, memory, sizes, device)


def _is_stack(model: PreTrainedModel) -> bool:
    try:
        blocks_of(model)
    except ModelError:
        return False
    return True


def statistics_store(folder: Path | str | None, limit: int | None = None) -> StatStore:
    """Returns a store of statistics.

    Args:
        folder: Where; None is the one for all runs of this user.
        limit: Bytes; None is that of the last run there.
    """
    place = Path(platformdirs.user_cache_dir("keeptune")) / "statistics" if folder is None else Path(folder)
    return StatStore(place, limit or recorded(place)[1] or DEFAULT_LIMIT)


def check_folder(where: str, folder: Path) -> None:
    """Checks that a folder is there or can be made.

    Raises:
        RecipeError: The path or one above it is a file.
    """
    present = next((path for path in (folder, *folder.absolute().parents) if path.exists()), folder)
    if present.exists() and not present.is_dir():
        raise RecipeError(
            where, got=f"{folder}, where {present} is a file", wanted="a folder", next_step=f"Choose another {where}."
        )


def device_named(name: str) -> str:
    """Returns the device that a name stands for; ``auto`` is CUDA where there is a GPU.

    Of several processes on a machine each has a GPU of its own.
    """
    device = name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    return f"cuda:{on_machine()[0]}" if device == "cuda" and world() > 1 else device


def check_device(name: str) -> None:
    """Checks that this machine has a device.

    Raises:
        RecipeError: It is no device, or not here.
    """
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(
            "device", got=name, wanted="auto, cpu, cuda or cuda:0", next_step="Correct the value."
        ) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise RecipeError(
            "device",
            got=f"{name}, with {torch.cuda.device_count()} CUDA devices at hand",
            wanted="a device that this machine has",
            next_step="Set `device: auto` or `device: cpu`.",
        )


def release_memory(used: int = 0) -> None:
    """Gives back what a finished stage held: a trainer's cycles, and the pages that the C library keeps.

    Args:
        used: Bytes of the model of the stage; the cycles of a small one are left to Python.
    """
    if used > _SMALL:
        gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; others give back by themselves
    if trim is not None:
        trim(0)
