"""GGUF files for llama.cpp: names and layout of weights, whether a file has those of a base, and how files are written.

Names are those of gguf's own map. llama.cpp rotates neighbouring pairs of a head's rows where Transformers rotates its
halves: in ``llama`` files the rows of q and k are in another order. So are the rows of a LoRA's B; its A, which reads
the inputs, is not changed. Gemma's files hold 1 + w for the weights w of norms.
"""

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

from keeptune.adapter.load import read_config
from keeptune.core.artefact import explain_full_disk
from keeptune.core.errors import ExportError, named

Quantise = Literal["f32", "f16", "q8_0"]
Entry = tuple[str, Sequence[int], Callable[[], Tensor]]  # name, shape, and what reads the values
# Transformers' model type to gguf's architecture, whether q and k are in llama.cpp's order, and what norms are off by.
_KNOWN = {"llama": ("llama", True, 0), "mistral": ("llama", True, 0), "gemma3_text": ("gemma3", False, 1)}
_KNOWN |= {name: (name, False, 0) for name in ("qwen2", "qwen3", "phi3")}
_FROM_CONFIG = {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}  # no weights of the model
_ANEW = ("GGUF.", "split.", "general.architecture", "general.alignment")
_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7}  # llama.cpp's
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

    def name(self, parameter: str) -> str:
        """Returns llama.cpp's name of a parameter such as ``model.norm.weight``; empty for one it does not know."""
        return self.names.get_name(parameter, try_suffixes=(".weight", ".bias")) or ""

    def stored(self, parameter: str, read: Callable[[], Tensor]) -> Tensor:
        """Returns a parameter, or the B of its change, as files hold it."""
        role, value = parameter.split(".")[-2], read().float()
        if role in self.heads:
            return value.reshape(self.heads[role], 2, -1, *value.shape[1:]).transpose(1, 2).reshape(value.shape)
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


def entry_of(tensor: Any) -> Entry:
    """Returns a tensor of an open file as :func:`write_file` takes it."""
    return tensor.name, tensor.shape.tolist()[::-1], partial(values_of, tensor)


def check_base(file: str, reader: Any, layout: Layout, weights: Sequence[Entry], values: Sequence[Entry] = ()) -> None:
    """Raises ExportError where an open file is not of a model: other names or shapes of its weights, or other values.

    Other values are some that no quantisation explains.
    """
    of, names = field_of(reader, "general.architecture"), {key: layout.name(key) for key, _, _ in weights}
    if of != layout.architecture:
        raise _other(file, f'the architecture "{of}"', f'"{layout.architecture}"')
    found, wanted = {tensor.name: tensor for tensor in reader.tensors}, set(names.values())
    # The file of a tied model may hold its embedding a second time, and a merged model may have got a head of its own.
    beside = _FROM_CONFIG | {"output.weight", ""}
    unknown = [key for key, name in names.items() if not name]
    lacks, more = sorted(wanted - found.keys() - beside), sorted(found.keys() - wanted - beside)
    for what, wrong in (("no name for", unknown), ("no", lacks), ("tensors that the model has not:", more)):
        if wrong:
            raise _other(file, f"{what} {named(wrong, 3)}", f"the {len(weights)} weights of the model")
    for key, shape, _ in weights:
        if names[key] in found and (held := found[names[key]].shape.tolist()[::-1]) != list(shape):
            raise _other(file, f"{names[key]} of shape {held}", f"{list(shape)}, as the model has it")
    for key, _, read in values:
        own = layout.stored(key, read)
        apart = float((values_of(found[names[key]]) - own).norm() / own.norm())
        if not apart < _OTHER:
            raise _other(file, f"{names[key]} that differs from {key} by {apart:.0%}", "weights of the same base")


def _other(file: Path | str, got: str, wanted: str) -> ExportError:
    step = "Pass the GGUF file of the base that the adapter was trained on with --base."
    return ExportError(f"base {file}", got=got, wanted=wanted, next_step=step)


def no_lora(folder: Path, got: str, wanted: str) -> ExportError:
    """Returns the error to raise for an adapter that llama.cpp has no form for."""
    return ExportError(f"adapter {folder}", got=got, wanted=f"{wanted}, which llama.cpp takes", next_step=_MERGE)


def write_lora_file(path: Path, folder: Path, layout: Layout, quantise: Quantise) -> float:
    """Writes an adapter that only adds to linear maps as a GGUF LoRA, and returns :func:`write_file`'s error.

    llama.cpp computes ``alpha / r B A`` with one alpha for all: B holds what PEFT's own scale differs by.

    Raises:
        ExportError: A target is a module that llama.cpp does not know, or a head that is tied.
    """
    config, entries = read_config(folder), []
    alphas, power = config.get("alpha_pattern") or {}, 0.5 if config.get("use_rslora") else 1
    most = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        tensors = {key.removeprefix("base_model.model."): file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118
    for key in sorted(tensors):
        module, _, part = key.partition(".lora_")
        if key.endswith(".base_layer.weight"):  # the base's own, that PEFT saves beside
            continue
        name = layout.name(f"{module}.weight")
        if part not in {"A.weight", "B.weight"} or not name.startswith(("blk.", "output.")):
            raise no_lora(folder, key, f"factors of modules of {layout.architecture}'s blocks")
        if name == "output.weight" and layout.tied:
            raise no_lora(folder, f"a LoRA of {module}, which is tied to the embedding", "one of a head of its own")
        value = tensors[key]
        if part == "B.weight":
            alpha = alphas.get(get_pattern_key(alphas.keys(), module), config["lora_alpha"])
            scale = alpha / value.shape[1] ** power * value.shape[1] / most
            value = layout.stored(f"{module}.weight", value.clone) * scale
        entries.append((f"{name}.lora_{part[0].lower()}", value.shape, value.clone))
    fields = {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": float(most)}
    return write_file(path, layout.architecture, fields, entries, quantise)


def write_whole_file(
    path: Path, layout: Layout, base: Any, weights: Sequence[Entry], quantise: Quantise, chat: Mapping[str, Any]
) -> float:
    """Writes a whole model with the metadata of its base's open file, but for what ``chat`` has."""
    entries = [entry_of(tensor) for tensor in base.tensors if tensor.name in _FROM_CONFIG]
    entries += [(layout.name(key), shape, partial(layout.stored, key, read)) for key, shape, read in weights]
    fields = {field.name: field for field in base.fields.values() if not field.name.startswith(_ANEW)}
    fields |= {"general.file_type": _FILE_TYPES[quantise], "general.quantization_version": 2}
    return write_file(path, layout.architecture, {**fields, **chat}, entries, quantise)


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
        types = getattr(value, "types", None) or [number if isinstance(value, int) else number.get_type(value)]
        given = value.contents() if hasattr(value, "contents") else value
        writer.add_key_value(key, given, types[0], types[-1] if len(types) > 1 else None)
    stored, lost, total = {}, 0.0, 0.0
    for name, shape, _ in entries:
        blocks = quantise != "q8_0" or shape[-1] % 32 == 0
        stored[name] = kind = kinds.F32 if len(shape) == 1 else kinds[quantise.upper()] if blocks else kinds.F16
        block, size = gguf.GGML_QUANT_SIZES[kind]
        writer.add_tensor_info(name, shape, np.dtype(np.float32), int(np.prod(shape)) // block * size, raw_dtype=kind)
    with explain_full_disk(path), np.errstate(over="ignore"), closing(writer):
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, _, read in entries:
            data = gguf.quantize(read().float().contiguous().numpy(), stored[name])
            if data.dtype != np.uint8 and not np.isfinite(data).all():
                got, step = f"weights up to {float(read().abs().max()):.1e}", "Export with --quantise f32."
                raise ExportError(f"{path}, {name}", got=got, wanted="below 65504 for float16", next_step=step)
            writer.write_tensor_data(data)
    again = {tensor.name: tensor for tensor in open_gguf(path).tensors}
    for name, _, read in entries:
        exact = read().double()
        lost += float((values_of(again[name]).double() - exact).square().sum())
        total += float(exact.square().sum())
    return (lost / total) ** 0.5 if total else 0.0
