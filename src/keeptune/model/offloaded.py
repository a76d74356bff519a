"""Base models whose weights stay in their safetensors files until a module needs them."""

from __future__ import annotations

import tempfile
import weakref
from contextlib import ExitStack
from typing import Any

import torch
from transformers import PreTrainedModel

from keeptune.core.offload import hook_of
from keeptune.model.blocks import head_of
from keeptune.model.gguf import is_gguf
from keeptune.model.pretrained import LoadOptions, load_model, load_shapes, load_weights


def load_offloaded(name: str, options: LoadOptions) -> PreTrainedModel:
    """Loads a model whose weights stay on disk: a call of a module reads them, and drops them afterwards.

    Where they are as the model needs them, they are read from its own files. Others, such as the experts that
    Transformers fuses, are written in a temporary folder (that of ``TMPDIR``) that is removed with the model. A drawn
    head is on the device.

    Args:
        name: A folder or a hub id.
        options: As of ``load_model``; ``device`` is where modules run.

    Raises:
        ModelError: As ``load_model``, or the model cannot be read in parts, as one quantised by bitsandbytes.
    """
    folder = tempfile.TemporaryDirectory(prefix="keeptune-offload-")
    with ExitStack() as failed:
        failed.callback(folder.cleanup)
        model = load_weights(name, options, device_map=_places(name, options), offload_folder=folder.name)
        weakref.finalize(model, failed.pop_all().close)
    for module in model.modules():
        hook = hook_of(module)
        if hook:
            hook.execution_device = torch.device(options.device)
        for buffer in module.buffers(recurse=False):
            buffer.data = buffer.data.to(options.device)
    return model.eval()


def load_floats(name: str, options: LoadOptions) -> PreTrainedModel:
    """Loads a model of floats to read its weights: left on disk, but for a GGUF file's, which is not read in parts."""
    return load_model(name, options) if is_gguf(name) else load_offloaded(name, options)


def _places(name: str, options: LoadOptions) -> dict[str, Any]:
    """Returns what is on disk: all, but for a classifier's head, which may have been drawn."""
    if options.head is None:
        return {"": "disk"}
    shapes = load_shapes(name, options)
    heads = head_of(shapes)
    return {part: options.device if part in heads else "disk" for part, _ in shapes.named_children()}
