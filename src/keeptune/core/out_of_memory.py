"""Out of memory, on a device or on the host: one error that says what was being done and what to turn."""

import re
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final, Literal

import torch
from accelerate.utils.memory import should_reduce_batch_size

from keeptune.core.errors import DeviceMemoryError

Stage = Literal["knowledge", "statistics", "plan", "train", "export", "evaluate"]

# What to turn, that which helps most first.
KEYS: Final[Mapping[Stage, tuple[str, str, str]]] = {
    "knowledge": ("knowledge.max_length", "quantization", "dtype: bfloat16"),
    "statistics": ("memory: blockwise", "knowledge.max_length", "targets (fewer)"),
    "plan": ("targets (fewer)", "memory: blockwise", "device: cpu"),
    "train": ("train.per_device_train_batch_size", "train.activation_checkpointing: true", "quantization"),
    "export": ("device: cpu", "dtype: bfloat16", "export.rank"),
    "evaluate": ("evaluate.0.batch_size", "evaluate.0.max_length", "quantization"),
}
_ASKED = re.compile(r"(?:[Tt]ried|Unable) to allocate ([\d.,]+ ?\w+)")
_ALLOCATOR = re.compile(r"ALLOC_FAILED|CUDA error: out of memory|[Cc]an't allocate memory|Cannot allocate memory")


@contextmanager
def out_of_memory(stage: Stage) -> Iterator[None]:
    """Raises a DeviceMemoryError where memory runs out, whichever library meets it; other errors pass.

    Args:
        stage: What is being done; a stage inside another one speaks for itself.
    """
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        known = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if not (known or should_reduce_batch_size(error) or _ALLOCATOR.search(str(error))):
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        asked = _ASKED.search(str(error))
        # What the frames hold would stay on the device as long as the error is there, and the next run has to fit.
        traceback.clear_frames(error.__traceback__)
        first, second, third = KEYS[stage]
        raise DeviceMemoryError(
            f"stage {stage}",
            got=f"no memory for {asked[1]}" if asked else "no memory",
            wanted=f"room on the device ({said.partition(' If reserved')[0][:300]})",
            next_step=f"Turn `{first}`, `{second}` or `{third}`; `keeptune run --dry-run` says what each takes. "
            "The same command goes on from here.",
        ) from error
