"""What a run needs of the machine: its folders, its device and the user's store of statistics."""

import ctypes
import gc
from pathlib import Path

import platformdirs
import torch

from keeptune.core.errors import RecipeError
from keeptune.core.processes import on_machine, world
from keeptune.statistics.store import DEFAULT_LIMIT, StatStore
from keeptune.statistics.store_use import recorded

_SMALL = 2**27  # bytes of a model that are not worth a search for cycles


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
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = 0 if here is None or here.type != device.type else torch.accelerator.device_count()
    if device.type != "cpu" and (device.index or 0) >= count:
        raise RecipeError(
            "device",
            got=f"{name}, with {count} devices of that kind at hand",
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
