"""GGUF files for llama.cpp: how it names and lays out weights, whether a file has those of a base, how they are written.

Names are those of gguf's own map. llama.cpp rotates neighbouring pairs of a head's rows where Transformers rotates its
halves: in ``llama`` files the rows of q and k are in another order. So are the rows of a LoRA's B; its A, which reads
the inputs, is not changed. Gemma's files hold 1 + w for the weights w of norms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import Tensor

from keeptune.core.artefact import explain_full_disk, read_json
from keeptune.core.errors import ExportError, named
from keeptune.core.low_rank import LowRank

Quantise = Literal["f32", "f16", "q8_0"]
Entry = tuple[str, Sequence[int], Callable[[], Tensor]]  # name, shape, and what reads the values
# Transformers' model type to gguf's architecture, whether q and k are in llama.cpp's order, and what norms are off by.
_KNOWN = {
    "llama": ("llama", True, 0),
    "mistral": ("llama", True, 0),
    "qwen2": ("qwen2", False, 0),
    "qwen3": ("qwen3", False, 0),
    "phi3": ("phi3", False, 0),
    "gemma3_text": ("gemma3", False, 1),
}
_FROM_CONFIG = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}  # no weights of the model
_ANEW = ("GGUF.", "split.", "general.architecture", "general.alignment", "general.file_type", "general.quantization")
_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7}  # llama.cpp's
_QUANTIZATION = 2  # the version of blocks such as q8_0's
_OTHER = 0.5  # a relative difference that no quantisation makes; of other weights, or rows in another order, it is 1.4
_MERGE = "Export the whole model: `keeptune export RUN --to gguf --merged --base base.gguf`."


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """How an architecture's weights are stored: gguf's name and map, heads whose rows are reordered, shift of norms."""

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
    """Returns the layout of weights by their config; ExportError for an architecture that is not vouched for."""
    import gguf

    if config.model_type not in _KNOWN:
        known, step = ", ".join(_KNOWN), "Merge (`keeptune merge`), and convert the folder with llama.cpp's own script."
        raise ExportError(
            where, got=f'the architecture "{config.model_type}"', wanted=f"one of {known}", next_step=step
        )
    architecture, rotated, shift = _KNOWN[config.model_type]
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if rotated else {}
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    return Layout(architecture, names, heads, shift, bool(config.tie_word_embeddings))


def open_gguf(file: Path | str) -> Any:
    """Opens a GGUF file to read; ExportError where it is none."""
    import gguf

    try:
        return gguf.GGUFReader(file)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise _other(file, f"{type(error).__name__}: {error}", "a whole GGUF file") from error


def field_of(reader: Any, key: str) -> Any:
    """Returns a value of an open file's metadata; None without one."""
    return reader.fields[key].contents() if key in reader.fields else None


def values_of(tensor: Any) -> Tensor:
    """Returns a tensor of an open file as floats, float32."""
    import gguf

    return torch.from_numpy(np.array(gguf.dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))


def check_base(
    file: Path | str, reader: Any, layout: Layout, weights: Sequence[Entry], values: Sequence[Entry]
) -> None:
    """Raises ExportError where a file is not of a model: other names, shapes, or values than quantisation makes.

    Args:
        file: The file.
        reader: The same, open.
        layout: Of the model.
        weights: Its parameters, whose names and shapes are compared.
        values: Those whose values are.
    """
    of, names = field_of(reader, "general.architecture"), {key: layout.name(key) or "" for key, _, _ in weights}
    if of != layout.architecture:
        raise _other(file, f'the architecture "{of}"', f'"{layout.architecture}"')
    found, wanted = {tensor.name: tensor for tensor in reader.tensors}, set(names.values())
    # The file of a tied model may hold its embedding a second time, and a merged model may have got a head of its own.
    beside = _FROM_CONFIG | {"output.weight"}
    unknown = [key for key, name in names.items() if not name]
    lacks, more = sorted(wanted - found.keys() - beside - {""}), sorted(found.keys() - wanted - beside)
    for what, wrong in (("no name for", unknown), ("no", lacks), ("tensors that the model has not:", more)):
        if wrong:
            raise _other(file, f"{what} {named(wrong, 3)}", f"the {len(weights)} weights of the model")
    for key, shape, _ in weights:
        stored = found.get(names[key])
        if stored is not None and (held := stored.shape.tolist()[::-1]) != list(shape):
            raise _other(file, f"{names[key]} of shape {held}", f"{list(shape)}, as the model has it")
    for key, _, read in values:
        own = layout.stored(key, read().float())
        apart = float((values_of(found[names[key]]) - own).norm() / own.norm())
        if not apart < _OTHER:
            raise _other(file, f"{names[key]} that differs from {key} by {apart:.0%}", "weights of the same base")


def _other(file: Path | str, got: str, wanted: str) -> ExportError:
    step = "Pass the GGUF file of the base that the adapter was trained on with --base."
    return ExportError(f"base {file}", got=got, wanted=wanted, next_step=step)


def no_lora(folder: Path, got: str, wanted: str) -> ExportError:
    """Returns the error to raise for an adapter that llama.cpp has no form for."""
    return ExportError(f"adapter {folder}", got=got, wanted=f"{wanted}, which llama.cpp takes", next_step=_MERGE)


def read_lora(folder: Path) -> dict[str, LowRank]:
    """Reads a plain LoRA, with PEFT's scale in B, by module; ExportError for tensors that are no factors of it."""
    config = read_json(folder / "adapter_config.json")
    alphas, power = config.get("alpha_pattern") or {}, 0.5 if config.get("use_rslora") else 1
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        tensors = {key.removeprefix("base_model.model."): file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
    modules = sorted(key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight"))
    factors = {f"{name}.lora_{part}.weight" for name in modules for part in "AB"}
    for key in sorted(tensors.keys() - factors):
        if not key.endswith(".base_layer.weight"):  # the base's own, that PEFT saves beside
            raise no_lora(folder, f"the tensor {key}", "factors of linear maps")
    changes = {}
    for name in modules:
        change = LowRank(B=tensors[f"{name}.lora_B.weight"], A=tensors[f"{name}.lora_A.weight"])
        alpha = alphas.get(get_pattern_key(alphas.keys(), name), config["lora_alpha"])
        changes[name] = change.scaled(alpha / change.rank**power)
    return changes


def write_lora_file(path: Path, folder: Path, layout: Layout, quantise: Quantise) -> float:
    """Writes an adapter as a GGUF LoRA, and returns :func:`write_file`'s error.

    llama.cpp computes ``alpha / r B A`` with one alpha for all: B holds what PEFT's own scale differs by.

    Raises:
        ExportError: A target is a module that llama.cpp does not know, or a head that is tied.
    """
    changes, entries = read_lora(folder), []
    alpha = max(change.rank for change in changes.values())
    for module, change in changes.items():
        key = f"{module}.weight"
        name = layout.name(key) or ""
        if not name.startswith("blk.") and name != "output.weight":
            raise no_lora(folder, f"a LoRA of {module}", f"one of modules of {layout.architecture}'s blocks")
        if name == "output.weight" and layout.tied:
            raise no_lora(folder, f"a LoRA of {module}, which is tied to the embedding", "one of a head of its own")
        B = layout.stored(key, change.B) * (change.rank / alpha)
        entries += [(f"{name}.lora_a", change.A.shape, change.A.clone), (f"{name}.lora_b", B.shape, B.clone)]
    fields = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": float(alpha)}
    return write_file(path, layout.architecture, fields, entries, quantise)


def write_whole_file(
    path: Path, layout: Layout, base: Any, weights: Sequence[Entry], quantise: Quantise, template: str | None
) -> float:
    """Writes a whole model with the metadata of its base's open file, but for a chat template that is given."""
    own = [tensor for tensor in base.tensors if tensor.name in _FROM_CONFIG]
    entries: list[Entry] = [(one.name, one.shape.tolist()[::-1], partial(values_of, one)) for one in own]
    entries += [(str(layout.name(key)), shape, partial(_stored, layout, key, read)) for key, shape, read in weights]
    fields = {field.name: field for field in base.fields.values() if not field.name.startswith(_ANEW)}
    fields |= {"general.file_type": _FILE_TYPES[quantise], "general.quantization_version": _QUANTIZATION}
    fields |= {"tokenizer.chat_template": template} if template else {}
    return write_file(path, layout.architecture, fields, entries, quantise)


def _stored(layout: Layout, key: str, read: Callable[[], Tensor]) -> Tensor:
    return layout.stored(key, read())


def write_file(
    path: Path, architecture: str, fields: Mapping[str, Any], entries: Sequence[Entry], quantise: Quantise
) -> float:
    """Writes a file: vectors in float32, matrices as told; where rows are no whole blocks of q8_0, in float16.

    Returns:
        How far what is read again is from what was written, relative (Frobenius); 0 for f32.

    Raises:
        ExportError: A weight is too large for float16.
    """
    import gguf

    kinds, number, writer = gguf.GGMLQuantizationType, gguf.GGUFValueType.UINT32, gguf.GGUFWriter(path, architecture)
    for key, value in fields.items():
        types = getattr(value, "types", None) or [
            number if isinstance(value, int) else gguf.GGUFValueType.get_type(value)
        ]
        given = value.contents() if hasattr(value, "contents") else value
        writer.add_key_value(key, given, types[0], types[-1] if len(types) > 1 else None)
    wanted = {"f32": kinds.F32, "f16": kinds.F16, "q8_0": kinds.Q8_0}[quantise]
    stored = {}
    for name, shape, _ in entries:
        whole = wanted != kinds.Q8_0 or shape[-1] % 32 == 0
        stored[name] = kind = kinds.F32 if len(shape) == 1 else wanted if whole else kinds.F16
        block, size = gguf.GGML_QUANT_SIZES[kind]
        writer.add_tensor_info(name, shape, np.dtype(np.float32), int(np.prod(shape)) // block * size, raw_dtype=kind)
    with explain_full_disk(path), np.errstate(over="ignore"), closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, _, read in entries:
            data = gguf.quantize(read().float().contiguous().numpy(), stored[name])
            if data.dtype != np.uint8 and not np.isfinite(data).all():
                wrong = f"weights up to {float(read().abs().max()):.1e}"
                step = "Export with --quantise f32."
                raise ExportError(f"{path}, {name}", got=wrong, wanted="below 65504 for float16", next_step=step)
            writer.write_tensor_data(data)
    lost = whole_norm = 0.0
    again = {tensor.name: tensor for tensor in open_gguf(path).tensors}
    for name, _, read in entries:
        exact = read().double()
        lost += float((values_of(again[name]).double() - exact).square().sum())
        whole_norm += float(exact.square().sum())
    return (lost / whole_norm) ** 0.5 if whole_norm else 0.0
