"""Shelf: tensors kept for later, in memory up to a limit, then in files of a temporary folder."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from keeptune.core.artefact import explain_full_disk

_log = logging.getLogger(__name__)
# A model that runs on the CPU shares its memory with what is kept: hardly anything is kept there.
_ON_CPU = 64 << 20


class Shelf:
    """Tensors by name, on the CPU; the folder, in that of ``TMPDIR``, is removed by :meth:`close`.

    Args:
        limit: Bytes that are held in memory.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._bytes = limit, 0
        self._held: dict[str, Tensor] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @classmethod
    def beside(cls, device: torch.device) -> Shelf:
        """Returns one for a model that runs on a device: it takes a quarter of the free memory, beside the CPU less."""
        quarter = psutil.virtual_memory().available // 4
        return cls(min(quarter, _ON_CPU) if device.type == "cpu" else quarter)

    def put(self, name: str, value: Tensor) -> None:
        """Keeps a tensor in the place of one of the same name.

        Raises:
            ArtefactError: The disk is full.
        """
        self.drop(name)
        value = value.detach().cpu()
        if self._bytes + value.nbytes <= self._limit:
            self._held[name] = value
            self._bytes += value.nbytes
            return
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="keeptune-inputs-")
            _log.info("blockwise: inputs of blocks beyond %d MB are kept in %s", self._limit >> 20, self._folder.name)
        path = self._path(name)
        with explain_full_disk(path):
            save_file({"value": value.contiguous()}, path)

    def get(self, name: str, device: torch.device) -> Tensor:
        """Returns a tensor on a device: a copy, which may be changed."""
        held = self._held.get(name)
        if held is not None:
            return held.to(device, copy=True)
        return load_file(self._path(name))["value"].to(device)

    def drop(self, name: str) -> None:
        """Forgets a tensor, if it is there."""
        held = self._held.pop(name, None)
        if held is not None:
            self._bytes -= held.nbytes
        elif self._folder is not None:
            self._path(name).unlink(missing_ok=True)

    def close(self) -> None:
        """Forgets all."""
        self._held.clear()
        if self._folder is not None:
            self._folder.cleanup()

    def _path(self, name: str) -> Path:
        assert self._folder is not None
        return Path(self._folder.name) / f"{name}.safetensors"
