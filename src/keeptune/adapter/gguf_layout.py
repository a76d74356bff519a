"""How llama.cpp stores a model's weights: their names, the order of their rows, and whether a file has those of a base.

Names are those of gguf's own map. llama.cpp rotates neighbouring pairs of a head's rows where Transformers rotates its
halves: of ``llama`` files, rows of q and k are in another order. So are the rows of a LoRA's B; its A, which reads the
inputs, is not changed. Gemma's files hold 1 + w for the weights w of norms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from keeptune.core.errors import ExportError, named

# Transformers' model type to gguf's architecture, whether q and k are in llama.cpp's order, and what norms are off by.
_KNOWN = {
    "llama": ("llama", True, 0),
    "mistral": ("llama", True, 0),
    "qwen2": ("qwen2", False, 0),
    "qwen3": ("qwen3", False, 0),
    "phi3": ("phi3", False, 0),
    "gemma3_text": ("gemma3", False, 1),
}
OF_FILES = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")  # made from the config
_OTHER = 0.5  # a relative difference that no quantisation makes; other weights, or rows in another order, differ by 1.4


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """How an architecture's weights are stored.

    Args:
        architecture: gguf's name of it.
        names: gguf's map of names.
        heads: Heads of queries and of keys, whose rows are in llama.cpp's order; empty where they are not.
        shift: What is added to the weights of norms.
        tied: The head is the embedding.
    """

    architecture: str
    names: Any
    heads: Mapping[str, int]
    shift: int
    tied: bool

    def name(self, parameter: str) -> str | None:
        """Returns llama.cpp's name of a parameter such as ``model.norm.weight``; None for one it does not know."""
        found: str | None = self.names.get_name(parameter, try_suffixes=(".weight", ".bias"))
        return found

    def stored(self, parameter: str, value: Tensor) -> Tensor:
        """Returns a parameter, or the B of its change, as files hold it."""
        role = parameter.split(".")[-2]
        if role in self.heads:
            split = value.reshape(self.heads[role], 2, -1, *value.shape[1:])
            return split.transpose(1, 2).reshape(value.shape)
        return value + self.shift if self.shift and role.endswith("norm") else value


def layout_of(config: Any, where: str) -> Layout:
    """Returns the layout of a model's weights by its config.

    Raises:
        ExportError: The architecture is not one whose layout is known.
    """
    import gguf

    if config.model_type not in _KNOWN:
        raise ExportError(
            where,
            got=f'the architecture "{config.model_type}"',
            wanted=f"one whose GGUF layout is checked: {', '.join(_KNOWN)}",
            next_step="Merge the adapter (`keeptune merge`), and convert the folder with llama.cpp's own "
            "convert_hf_to_gguf.py.",
        )
    architecture, rotated, shift = _KNOWN[config.model_type]
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if rotated else {}
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    return Layout(architecture, names, heads, shift, bool(config.tie_word_embeddings))


def open_gguf(file: Path) -> Any:
    """Opens a GGUF file to read; ExportError where it is none."""
    import gguf

    try:
        return gguf.GGUFReader(file)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise ExportError(
            f"base {file}",
            got=f"{type(error).__name__}: {error}",
            wanted="a whole GGUF file of the base",
            next_step="Pass the file of the base that the adapter was trained on with --base.",
        ) from error


def field_of(reader: Any, key: str) -> Any:
    """Returns a value of a file's metadata; None without one."""
    return reader.fields[key].contents() if key in reader.fields else None


def values_of(tensor: Any) -> Tensor:
    """Returns an entry of an open file as floats, float32."""
    import gguf

    return torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))


def check_file(file: Path, reader: Any, layout: Layout, shapes: Mapping[str, Sequence[int]]) -> list[Any]:
    """Checks that a file holds weights of a model's names and shapes, and returns those it needs beside: rope factors.

    Raises:
        ExportError: It is of another architecture, or lacks weights, has others, or has some of another shape.
    """
    of = field_of(reader, "general.architecture")
    if of != layout.architecture:
        raise _other(file, f'the architecture "{of}"', f'"{layout.architecture}"')
    wanted = {name: tuple(shape) for key, shape in shapes.items() if (name := layout.name(key)) is not None}
    found = {tensor.name: tensor for tensor in reader.tensors}
    # The file of a tied model may hold its embedding a second time, and a merged model may have got a head of its own.
    optional = {"output.weight", *OF_FILES}
    lacks, more = sorted(wanted.keys() - found.keys() - optional), sorted(found.keys() - wanted.keys() - optional)
    if lacks or more:
        got = [f"no {named(lacks, 3)}"] * bool(lacks) + [f"{named(more, 3)}, which the model has not"] * bool(more)
        raise _other(file, "; ".join(got), f"the {len(wanted)} weights of the model")
    for name in wanted.keys() & found.keys():
        shape = tuple(int(size) for size in reversed(found[name].shape))
        if shape != wanted[name]:
            raise _other(file, f"{name} of shape {shape}", f"{wanted[name]}, as the model has it")
    return [found[name] for name in OF_FILES if name in found]


def check_values(file: Path, reader: Any, layout: Layout, weights: Mapping[str, Tensor]) -> None:
    """Checks that a file's weights are those of a base but for their quantisation; ExportError names one that is not.

    Args:
        file: The file.
        reader: The same, open.
        layout: Of the base.
        weights: Some weights of the base, by their parameter.
    """
    found = {tensor.name: tensor for tensor in reader.tensors}
    for key, weight in weights.items():
        own = layout.stored(key, weight.float())
        apart = float((values_of(found[str(layout.name(key))]) - own).norm() / own.norm())
        if not apart < _OTHER:
            raise _other(file, f"{layout.name(key)} that differs from {key} by {apart:.0%}", "weights of the same base")


def _other(file: Path, got: str, wanted: str) -> ExportError:
    return ExportError(
        f"base {file}",
        got=got,
        wanted=wanted,
        next_step="Pass the GGUF file of the base that the adapter was trained on with --base.",
    )
