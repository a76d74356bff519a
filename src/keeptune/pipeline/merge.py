"""keeptune merge: an adapter and its base to one whole model."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast, get_args

from keeptune.adapter.load import SIDECAR, check_base
from keeptune.adapter.merging import is_streamed, merge
from keeptune.core.artefact import read_json
from keeptune.core.errors import ModelError, need_known
from keeptune.model.head import Head, body_fingerprint
from keeptune.model.pretrained import Dtype, LoadOptions, load_config, load_floats, load_model, load_tokenizer
from keeptune.model.quantization import stays_quantised
from keeptune.pipeline.machine import device_named


def merge_adapter(
    adapter: Path, output: Path, *, base: str | None = None, dtype: str = "auto", original: str | None = None
) -> float:
    """Merges an adapter into its base and writes the whole model, with its tokenizer.

    One that was trained on a quantised base is merged into the original weights, never into those of four bits.

    Args:
        adapter: A LoRA adapter folder.
        output: Where the model goes.
        base: Path or hub id; None takes what the adapter names.
        original: Path or hub id of what a quantised base was before; None takes what the adapter names, or the base
            where it was quantised as it was loaded.
        dtype: Of the merged model, ``"auto"``, ``"float32"``, ``"bfloat16"`` or ``"float16"``.

    Returns:
        The largest difference in logits between adapter on base and merged model.

    Raises:
        ModelError: The folder is not an adapter, or is one for another base; or its base is stored quantised and the
            original is not known.
        ExportError: The output holds something else, or the logits of the merged model are not finite.
        RecipeError: The dtype is unknown.
    """
    need_known(dtype, get_args(Dtype), "--dtype", ", ".join(get_args(Dtype)))
    name, head = base or base_of(adapter), head_of_adapter(adapter)
    options = LoadOptions(dtype=cast(Dtype, dtype), head=head)
    load = load_floats if is_streamed(adapter) else load_model
    config, fields = load_config(name, options), quantised_in(adapter)
    whole = _original(adapter, name, original) if stays_quantised(fields, config) else name
    if (adapter / SIDECAR).is_file():
        source = replace(options, dtype=trained_in(adapter) or options.dtype, quantization=fields)
        if stays_quantised(fields, config):
            source = replace(source, device=device_named("auto"))
        trained_on = (load_model if stays_quantised(fields, config) else load)(name, source)
        check_base(adapter, body_fingerprint(trained_on), None if head is None else head.labels)
    return merge(adapter, output, base=whole, load=partial(load, options=options), tokenizer=load_tokenizer(name))


def _original(adapter: Path, name: str, original: str | None) -> str:
    """Returns the model of floats that an adapter of a quantised base is merged into."""
    found = original or original_in(adapter) or (name if quantised_in(adapter) is not None else None)
    if found is None:
        raise ModelError(
            f"adapter {adapter}",
            got=f"an adapter for {name}, which is stored quantised",
            wanted="the original weights: a merge in four bits would round the change away",
            next_step="Name the model that was quantised with --original.",
        )
    return str(found)


def head_of_adapter(adapter: Path) -> Head | None:
    """Returns the head that an adapter brings; None for a language model.

    The base's own head may be any, as it is replaced.

    Raises:
        ModelError: It is a classifier of unknown labels.
    """
    labels = _read(adapter / SIDECAR).get("labels")
    if labels is None and _read(adapter / "adapter_config.json").get("task_type") == "SEQ_CLS":
        raise ModelError(
            f"adapter {adapter}",
            got=f"a classifier without keeptune's {SIDECAR}",
            wanted="the labels that it distinguishes",
            next_step="Merge it with PEFT: load the base with its number of labels, then merge_and_unload().",
        )
    return None if labels is None else Head(tuple(labels))


def trained_in(adapter: Path) -> Dtype | None:
    """Returns the dtype that an adapter's base was loaded in; None where keeptune did not make the adapter.

    Fingerprints differ between dtypes.
    """
    dtype: Dtype | None = _read(adapter / SIDECAR).get("provenance", {}).get("dtype")
    return dtype


def quantised_in(adapter: Path) -> dict[str, Any] | None:
    """Returns how an adapter's base was quantised as it was loaded; None where it was not, or as it is stored."""
    record = _read(adapter / SIDECAR)
    if "trained_on" in record:  # merged into the original
        return None
    fields: dict[str, Any] | None = record.get("quantization") or record.get("provenance", {}).get("quantization")
    return fields


def original_in(adapter: Path) -> str | None:
    """Returns what an adapter's quantised base was before, as its export found it; None where it did not."""
    original: str | None = _read(adapter / SIDECAR).get("export", {}).get("original")
    return original


def base_of(adapter: Path) -> str:
    """Returns the path or hub id of the base that an adapter was made for.

    Raises:
        ModelError: The adapter names none.
    """
    config = adapter / "adapter_config.json"
    named = _read(config).get("base_model_name_or_path")
    if not named:
        raise ModelError(
            f"adapter {adapter}",
            got="an adapter_config.json that names no base" if config.is_file() else "no adapter_config.json",
            wanted="a PEFT adapter folder",
            next_step="Pass the `adapter` folder of a run; --base names the base.",
        )
    return str(named)


def _read(record: Path) -> dict[str, Any]:
    """Returns what a JSON file holds, nothing where there is none."""
    return dict(read_json(record)) if record.is_file() else {}
