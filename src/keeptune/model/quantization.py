"""How a base is quantised as it is loaded, by the recipe's ``quantization``, and bases in GGUF files.

Transformers dequantises a GGUF file when it loads it; what is trained on is an ordinary float model.
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.integrations.gguf import GGUF_ARCHS
from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    LOADING_ATTRIBUTES_CONFIG_TYPES,
    AutoHfQuantizer,
    AutoQuantizationConfig,
)
from transformers.utils import is_gguf_available

from keeptune.core.errors import ModelError, RecipeError, need_known, not_there

_BNB = {"load_in_4bit": "bitsandbytes_4bit", "load_in_8bit": "bitsandbytes_8bit"}
_KEY, _TYPE = "quantization", "bnb_4bit_quant_type"
_SKIPPED = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules")  # what configs call it


def check_quantization(fields: Mapping[str, Any]) -> None:
    """Checks the fields of a quantisation; that its package is installed shows when a model is loaded.

    Args:
        fields: Of Transformers' config: ``load_in_4bit`` and the like, or a ``quant_method`` with its own.

    Raises:
        RecipeError: The method or a field is unknown, or a value does not fit.
    """
    kind = _kind(fields)
    wanted = "load_in_4bit: true, load_in_8bit: true, or a quant_method that Transformers knows"
    need_known(kind, AUTO_QUANTIZATION_CONFIG_MAPPING, f"{_KEY}.quant_method", wanted)
    known, wanted = _known(kind), f"a field of Transformers' {AUTO_QUANTIZATION_CONFIG_MAPPING[kind].__name__}"
    for key in sorted(fields.keys() - {"quant_method"}):
        need_known(key, known, f"{_KEY}.{key}", wanted)
    need_known(fields.get(_TYPE, "nf4"), ("nf4", "fp4"), f"{_KEY}.{_TYPE}", "nf4 or fp4")
    try:
        AutoQuantizationConfig.from_dict(dict(fields))
    except ImportError:
        pass  # the package is looked for where the model is loaded
    except (TypeError, ValueError, AttributeError, AssertionError, NotImplementedError) as error:
        raise RecipeError(
            _KEY,
            got=" ".join(str(error).split()),
            wanted="values that Transformers takes",
            next_step="Correct the value.",
        ) from error


def stored_quantization(config: Any) -> dict[str, Any] | None:
    """Returns the fields of the quantisation that a model is stored in, as its config says; None for floats."""
    stored = getattr(config, "quantization_config", None)
    return stored if stored is None or isinstance(stored, dict) else dict(stored.to_dict())


def loading(
    fields: Mapping[str, Any] | None, config: Any, device: str | torch.device, where: str = "model"
) -> dict[str, Any]:
    """Returns what ``from_pretrained`` takes besides to load a quantised model; nothing for one that is not.

    Without fields of the recipe's it is loaded as it is stored. On the device weights are quantised, and stay.

    Raises:
        ModelError: The checkpoint is quantised already, the package is not installed, or this machine cannot run it.
    """
    stored = stored_quantization(config)
    if stored is None and fields is None:
        return {}
    placed = {"device_map": {"": str(device)}}
    try:
        # A copy: Transformers completes some configs in place.
        own = None if stored is None else AutoQuantizationConfig.from_dict(dict(stored))
        asked = None if fields is None else AutoQuantizationConfig.from_dict(dict(fields))
        # A recipe's config may only say how a quantised checkpoint is loaded, such as ``dequantize``.
        says_how = isinstance(asked, LOADING_ATTRIBUTES_CONFIG_TYPES)
        if own is not None and asked is not None and not (says_how and asked.quant_method == own.quant_method):
            raise ModelError(
                where,
                got=f"{_KEY} for a checkpoint that is quantised already ({own.quant_method.value})",
                wanted=f"no `{_KEY}`: it loads as it is stored",
                next_step=f"Leave `{_KEY}` out, or name the original model.",
            )
        quantiser = AutoHfQuantizer.from_config(asked or own, pre_quantized=own is not None)
        quantiser.validate_environment(dtype=torch.bfloat16, weights_only=True, **placed)
    except (ImportError, RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise cannot_quantise(where, error) from error
    return placed if asked is None else {**placed, "quantization_config": asked}


def with_precise(fields: Mapping[str, Any], modules: Sequence[str]) -> dict[str, Any]:
    """Returns the fields with modules that stay in floats, besides those that are named: a head that is drawn."""
    key = next((key for key in _SKIPPED if key in _known(_kind(fields))), None)
    return dict(fields) if key is None else {**fields, key: [*(fields.get(key) or ()), *modules]}


def stays_quantised(fields: Mapping[str, Any] | None, config: Any = None) -> bool:
    """Returns whether a model's weights are quantised once it is loaded, as its config and the recipe's fields say."""
    values = {**(stored_quantization(config) or {}), **(fields or {})}
    return bool(values) and not values.get("dequantize") and values.get("quant_method") != "gguf"


def goes_with_shards(fields: Mapping[str, Any] | None, config: Any) -> bool:
    """Returns whether FSDP2 takes a model: floats, or bitsandbytes' four bits, which accelerate leaves whole."""
    values = {**(stored_quantization(config) or {}), **(fields or {})}
    return bool(values.get("load_in_4bit")) or not stays_quantised(fields, config)


def quantised_on_load(model: Any) -> dict[str, Any] | None:
    """Returns the fields of the quantisation that a model was loaded with; None for one that is stored as it is."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    quantiser = getattr(inner, "hf_quantizer", None)
    if quantiser is None or quantiser.pre_quantized:
        return None
    fields = {key: value for key, value in quantiser.quantization_config.to_dict().items() if not key.startswith("_")}
    return {key: value for key, value in fields.items() if key in _known(_kind(fields)) | {"quant_method"}}


def cannot_quantise(where: str, error: Exception) -> ModelError:
    """Returns the error for a quantisation whose package is missing, or that this machine cannot run."""
    text = " ".join(str(error).split())
    missing = re.search(r"pip install [^`\n]*[\w>=.'\"\]]", text)
    package = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
    if package is not None or missing is not None:
        install = missing[0].rstrip("'\"") if missing is not None and package is None else f"pip install {package}"
        next_step = f"Run `{install}`."
    else:
        next_step = "Load on a device that it runs on, or take load_in_4bit of bitsandbytes."
    return ModelError(where, got=text[:300], wanted="a quantisation that runs here", next_step=next_step)


def _kind(fields: Mapping[str, Any]) -> Any:
    return next((name for key, name in _BNB.items() if fields.get(key)), fields.get("quant_method"))


def _known(kind: str) -> frozenset[str]:
    """Returns the fields of a quantisation's config."""
    parameters = inspect.signature(AUTO_QUANTIZATION_CONFIG_MAPPING[kind].__init__).parameters
    return frozenset(parameters) - {"self", "kwargs"}


_ARCHITECTURES = sorted({*GGUF_SUPPORTED_ARCHITECTURES, *GGUF_ARCHS} - {"general", "tokenizer"})


def is_gguf(name: str) -> bool:
    """Returns whether a model's name is that of a GGUF file: ``folder/file.gguf``, or ``org/name/file.gguf``."""
    return name.lower().endswith(".gguf")


def place_of(name: str) -> tuple[str, dict[str, str]]:
    """Returns a folder or hub id, and of a GGUF file its name there, as ``from_pretrained`` takes both."""
    path = Path(name).expanduser()
    if not is_gguf(name):
        return str(path) if name.startswith("~") else name, {}
    if path.is_file() or not _is_on_hub(name):
        return str(path.parent.absolute()), {"gguf_file": path.name}
    return "/".join(path.parts[:2]), {"gguf_file": "/".join(path.parts[2:])}


def _is_on_hub(name: str) -> bool:
    return name.count("/") >= 2 and not name.startswith((".", "/", "~"))


def check_gguf(name: str) -> None:
    """Checks that a GGUF file is there, or may be on the hub, and that what reads it is installed.

    Raises:
        ModelError: It is not.
    """
    if not Path(name).expanduser().is_file() and not _is_on_hub(name):
        raise not_there(f"model {name}", "file", "a GGUF file, or one on the hub: org/name/file.gguf", ModelError)
    if not is_gguf_available():
        raise ModelError(
            f"model {name}",
            got="no package gguf",
            wanted="the package that reads GGUF files",
            next_step="Install it: pip install 'keeptune[quantised]'.",
        )


def gguf_error(name: str, error: Exception) -> ModelError:
    """Returns the error to raise for a GGUF file that Transformers could not load."""
    text, wanted = str(error).strip().split("\n")[0], "a whole GGUF file of a causal language model"
    if "architecture" in text:
        wanted = f"an architecture that Transformers reads from GGUF: {', '.join(_ARCHITECTURES)}"
    return ModelError(
        f"model {name}",
        got=f"{type(error).__name__}: {text}",
        wanted=wanted,
        next_step="The file is cut or damaged, or of a type that Transformers cannot read: get it again, or take the "
        "model's folder of safetensors.",
    )
