"""GGUF files written: a LoRA, or a whole model with the metadata of its base's file; a weight in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from peft.utils.other import get_pattern_key
from safetensors import safe_open
from torch import Tensor

from keeptune.adapter.gguf_layout import OF_FILES, Layout, open_gguf, values_of
from keeptune.core.artefact import explain_full_disk, read_json
from keeptune.core.errors import ExportError
from keeptune.core.low_rank import LowRank

Quantise = Literal["f32", "f16", "q8_0"]
_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7}  # llama.cpp's, for whole models
_PREFIX = "base_model.model."
_OWN_FIELDS = {"general.architecture", "general.alignment", "general.file_type", "general.quantization_version"}


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """A tensor of a file: its name and shape, and what reads it when it is written."""

    name: str
    shape: Sequence[int]
    read: Callable[[], Tensor]


def read_lora(folder: Path) -> dict[str, LowRank]:
    """Reads a plain LoRA, with PEFT's scale in B; module name to its change.

    Raises:
        ExportError: It has tensors that are no factors of a linear map.
    """
    config = read_json(folder / "adapter_config.json")
    alphas = config.get("alpha_pattern") or {}
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        tensors = {name.removeprefix(_PREFIX): file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
    modules = sorted({name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")})
    other = sorted(tensors.keys() - {f"{name}.lora_{part}.weight" for name in modules for part in "AB"})
    if other:
        raise no_lora(folder, f"the tensor {other[0]}", "factors of linear maps")
    changes = {}
    for name in modules:
        factors = LowRank(B=tensors[f"{name}.lora_B.weight"], A=tensors[f"{name}.lora_A.weight"])
        alpha = alphas.get(get_pattern_key(alphas.keys(), name), config["lora_alpha"])
        changes[name] = factors.scaled(alpha / factors.rank ** (0.5 if config.get("use_rslora") else 1))
    return changes


def no_lora(folder: Path, got: str, wanted: str) -> ExportError:
    """Returns the error to raise for an adapter that llama.cpp has no form for."""
    return ExportError(
        f"adapter {folder}",
        got=got,
        wanted=f"{wanted}, which is what llama.cpp takes of an adapter",
        next_step="Export the whole model: `keeptune export RUN --to gguf --merged --base base.gguf`.",
    )


def write_lora_file(path: Path, folder: Path, layout: Layout, quantise: Quantise) -> float:
    """Writes an adapter as a GGUF LoRA, and returns how far the file's change is from the adapter's, relative.

    The error is ``sqrt(sum ‖Δ' - Δ‖² / sum ‖Δ‖²)`` over all targets, of the file as it is read again; 0 for f32.
    llama.cpp computes ``alpha / r B A`` with one alpha for all: B holds what PEFT's own scale differs by.

    Raises:
        ExportError: A target is a module that llama.cpp does not know, or a head that is tied.
    """
    import gguf

    changes, entries, held = read_lora(folder), [], {}
    alpha = max(change.rank for change in changes.values())
    for module, change in changes.items():
        key = f"{module}.weight"
        name = layout.name(key)
        if name is None or not name.startswith("blk.") and name != "output.weight":
            raise no_lora(folder, f"a LoRA of {module}", f"modules that llama.cpp knows in {layout.architecture}")
        if name == "output.weight" and layout.tied:
            raise no_lora(folder, f"a LoRA of {module}, which is tied to the embedding", "a head of its own")
        held[name] = LowRank(B=layout.stored(key, change.B) * (change.rank / alpha), A=change.A)
        for part, value in (("a", held[name].A), ("b", held[name].B)):
            entries.append(Entry(f"{name}.lora_{part}", value.shape, lambda value=value: value))
    text, real = gguf.GGUFValueType.STRING, gguf.GGUFValueType.FLOAT32
    fields = [("general.type", "adapter", text, None), ("adapter.type", "lora", text, None)]
    fields.append(("adapter.lora.alpha", float(alpha), real, None))
    write_file(path, layout.architecture, fields, entries, quantise)
    tensors = {tensor.name: tensor for tensor in open_gguf(path).tensors}
    lost = whole = 0.0
    for name, change in held.items():
        again = LowRank(B=values_of(tensors[f"{name}.lora_b"]), A=values_of(tensors[f"{name}.lora_a"]))
        exact = change.to(torch.float64)
        lost += float(again.to(torch.float64).minus(exact).norm_squared().clamp_min(0)) if quantise != "f32" else 0.0
        whole += float(exact.norm_squared())
        if quantise == "f32" and not (torch.equal(again.A, change.A) and torch.equal(again.B, change.B)):
            raise ExportError(str(path), got=f"{name} not as written", wanted="the adapter", next_step="Export again.")
    return (lost / whole) ** 0.5 if whole else 0.0


def write_whole_file(
    path: Path, layout: Layout, base: Any, weights: Sequence[Entry], *, template: str | None, quantise: Quantise
) -> None:
    """Writes a whole model with the metadata of its base's file.

    Args:
        path: The file.
        layout: Of the model.
        base: The file of the base, open.
        weights: Its parameters, by Transformers' names; and what files have beside, by theirs.
        template: The chat template; None leaves the base's.
        quantise: Of matrices; vectors are float32.

    Raises:
        ExportError: A weight has no name in llama.cpp, or is too large for float16.
    """
    import gguf

    fields = fields_of(base, {"tokenizer.chat_template"} if template else set())
    number, text = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.STRING
    fields += [("tokenizer.chat_template", template, text, None)] if template else []
    fields += [("general.file_type", _FILE_TYPES[quantise], number, None)]
    fields += [("general.quantization_version", gguf.GGML_QUANT_VERSION, number, None)]
    entries = []
    for weight in weights:
        name = weight.name if weight.name in OF_FILES else layout.name(weight.name)
        if name is None:
            raise ExportError(
                str(path), got=f"the weight {weight.name}", wanted="weights that llama.cpp knows", next_step=_CONVERT
            )
        entries.append(Entry(name, weight.shape, lambda own=weight: layout.stored(own.name, own.read())))  # type: ignore[misc]
    write_file(path, layout.architecture, fields, entries, quantise)


def fields_of(base: Any, without: Collection[str] = ()) -> list[tuple[Any, ...]]:
    """Returns the metadata of an open file as :func:`write_file` takes it, without what is written anew."""
    fields = []
    for field in base.fields.values():
        if not field.name.startswith(("GGUF.", "split.")) and field.name not in {*_OWN_FIELDS, *without}:
            kind, *inner = field.types
            fields.append((field.name, field.contents(), kind, inner[-1] if inner else None))
    return fields


_CONVERT = "Merge (`keeptune merge`) and convert the folder with llama.cpp's own convert_hf_to_gguf.py."


def write_file(
    path: Path, architecture: str, fields: Sequence[tuple[Any, ...]], entries: Sequence[Entry], quantise: Quantise
) -> None:
    """Writes a file: vectors in float32, matrices as told; where rows are no whole blocks of q8_0, in float16."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture)
    types = {}
    for field in fields:
        writer.add_key_value(*field)
    for entry in entries:
        types[entry.name] = kind = _type(entry.shape, quantise)
        block, size = gguf.GGML_QUANT_SIZES[kind]
        count = int(np.prod(entry.shape)) // block * size
        writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), count, raw_dtype=kind)
    with explain_full_disk(path):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            value = np.ascontiguousarray(entry.read().detach().float().numpy())
            with np.errstate(over="ignore"):
                data = gguf.quantize(value, types[entry.name])
            if data.dtype != np.uint8 and not np.isfinite(data).all():
                largest = f"{np.abs(value).max():.1e}"
                raise ExportError(
                    f"{path}, {entry.name}",
                    got=f"weights up to {largest}",
                    wanted="finite ones, below 65504 in float16",
                    next_step="Export with --quantise f32.",
                )
            writer.write_tensor_data(data)
        writer.close()


def _type(shape: Sequence[int], quantise: Quantise) -> Any:
    from gguf import GGMLQuantizationType as Type

    if len(shape) == 1 or quantise == "f32":
        return Type.F32
    return Type.Q8_0 if quantise == "q8_0" and shape[-1] % 32 == 0 else Type.F16
