"""Loads a base and its tokenizer from a folder, the hub or a GGUF file, to a device or left on disk until needed."""

import logging
import struct
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from accelerate.utils import patch_environment
from huggingface_hub.errors import StrictDataclassError
from peft.utils.integrations import get_bnb_param_type
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from keeptune.core.errors import ModelError, need_finite, not_there
from keeptune.core.offload import hook_of, stored_value
from keeptune.core.weights import is_quantised, keep_layout, refuse_misread
from keeptune.data.template_limits import refuse_endless
from keeptune.model.blocks import head_of, positions
from keeptune.model.config_sizes import check_counts, check_sizes
from keeptune.model.head import Head
from keeptune.model.quantization import check_gguf, gguf_error, is_gguf, loading, place_of, with_precise

_log = logging.getLogger(__name__)
_REFUSALS = (
    *(OSError, ValueError, ImportError, RuntimeError, TypeError, LookupError, AttributeError, ArithmeticError),
    *(AssertionError, SafetensorError, StrictDataclassError, struct.error),
)
_BY_ALL = {"FSDP_CPU_RAM_EFFICIENT_LOADING": "false"}  # else Transformers draws no head on some processes

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
DeviceMap = Literal["auto"] | dict[str, int | str]
StartFrom = Literal["quantised", "original"]  # which weights of a quantised base starts and scores are read from


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """How a base model is loaded.

    Args:
        dtype: ``"auto"`` takes what the model's config says.
        device: Where the weights go.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Run Python code that the model's repository brings.
        allow_pickle: Read ``.bin`` weights, which can run code when loaded.
        head: The head of a sequence classifier, drawn from its seed if the base has none; None loads a causal
            language model.
        quantization: Fields of Transformers' quantisation config, checked (:func:`check_quantization`); None loads the
            weights as they are stored.
        device_map: Which modules go to which device, ``"auto"`` to leave it to accelerate; None: all to ``device``.
    """

    dtype: Dtype = "auto"
    device: str | torch.device = "cpu"
    revision: str | None = None
    trust_remote_code: bool = False
    allow_pickle: bool = False
    head: Head | None = None
    quantization: Mapping[str, Any] | None = None
    device_map: DeviceMap | None = None

    @property
    def source(self) -> dict[str, Any]:
        """What Transformers takes for configs, tokenizers and models alike."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}


_DEFAULTS = LoadOptions()


def load_model(name: str, options: LoadOptions = _DEFAULTS) -> PreTrainedModel:
    """Loads a causal language model or a sequence classifier, in evaluation mode.

    Of a GGUF file (``folder/file.gguf``, on the hub ``org/name/file.gguf``) it is dequantised; the log says so.

    Raises:
        ModelError: There is no such model, its safetensors weights are missing, incomplete or damaged, or it
            brings code that was not allowed; or its quantisation cannot run here.
    """
    if options.device_map is not None:
        model = load_weights(name, options, device_map=options.device_map).eval()
        places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
        if len(places) > 1 and places & {"cpu", "disk"}:
            raise ModelError(
                f"model {name}, device_map",
                got=f"parts on {', '.join(sorted(places))}: the devices have no memory for all of it",
                wanted="all of the model on devices",
                next_step="Take more devices, `quantization`, or FSDP2 (`keeptune launch`).",
            )
        return model
    model = load_weights(name, options)
    # Quantised weights are where they were quantised; of eight bits Transformers moves none.
    loaded: PreTrainedModel = (model if is_quantised(model) else model.to(options.device)).eval()
    return loaded


def load_weights(name: str, options: LoadOptions, **placement: Any) -> PreTrainedModel:
    """Loads a model to where the arguments of ``from_pretrained`` say, by default the CPU; see :func:`load_model`."""
    _check_folder(name, options.allow_pickle)
    head = options.head
    kind: Any = AutoModelForCausalLM if head is None else AutoModelForSequenceClassification
    place, file = place_of(name)
    with _explained(name), torch.random.fork_rng(), patch_environment(**_BY_ALL):
        torch.manual_seed(0 if head is None else head.seed)
        model, info = kind.from_pretrained(
            place,
            dtype=options.dtype,
            use_safetensors=None if options.allow_pickle else True,
            output_loading_info=True,
            **options.source,
            **file,
            **(quantised_loading(name, options) | placement),
            **({} if head is None else head.config),
        )
    if file:
        _log.info(
            "model %s: dequantised from GGUF to %s, %.2g GB", name, model.dtype, model.get_memory_footprint() / 1e9
        )
    _check_head(name, info["missing_keys"], model, options)
    keep_layout(model)
    refuse_misread(model)
    loaded: PreTrainedModel = model
    return loaded


def quantised_loading(name: str, options: LoadOptions) -> dict[str, Any]:
    """Returns what ``from_pretrained`` takes to load quantised weights, by the config alone; GGUF is dequantised.

    Raises:
        ModelError: There is no such model, or its quantisation cannot run here.
    """
    fields = options.quantization
    if is_gguf(name):
        if fields is not None:
            raise ModelError(
                f"model {name}",
                got="`quantization` for a GGUF file",
                wanted="none: it is dequantised as it is loaded",
                next_step="Leave `quantization` out, or name the original model.",
            )
        return {"quantization_config": GgufConfig(dequantize=True)}
    if fields is not None and options.head is not None:
        fields = with_precise(fields, head_of(load_shapes(name, options)))
    return loading(fields, load_config(name, options), options.device, f"model {name}")


def load_config(name: str, options: LoadOptions = _DEFAULTS) -> Any:
    """Returns a model's config.

    Raises:
        ModelError: There is no such model, or it brings code that was not allowed.
    """
    _check_folder(name, allow_pickle=True)
    place, file = place_of(name)
    with _explained(name):
        config = AutoConfig.from_pretrained(place, **file, **options.source)
        check_sizes(name, config.get_text_config())
    return config


def _check_head(name: str, missing_keys: Iterable[str], model: Any, options: LoadOptions) -> None:
    """Refuses weights without some parameter, a drawn head's aside, and a head with the labels in another order."""
    head = options.head
    drawn = () if head is None else tuple(f"{module}." for module in head_of(model))
    missing = sorted(key for key in missing_keys if not key.startswith(drawn))
    if missing:
        raise ModelError(
            f"model {name}",
            got=f"no weights for {missing[0]}" + (f" and {len(missing) - 1} more" if len(missing) > 1 else ""),
            wanted="weights for every module; Transformers would draw random ones",
            next_step="Copy the whole model, and check that it is a causal language model."
            if head is None
            else "Copy the whole model; only the head may be missing.",
        )

    if head is None or missing_keys:
        return
    config = load_config(name, options)
    brought = [config.id2label[index] for index in sorted(config.id2label)]
    if sorted(brought) == sorted(head.labels) and brought != list(head.labels):
        raise ModelError(
            f"model {name}",
            got=f"a head for the labels {', '.join(brought)}",
            wanted=f"the order {', '.join(head.labels)}",
            next_step=f"Set task.labels: [{', '.join(brought)}].",
        )


def load_positions(name: str, options: LoadOptions = _DEFAULTS) -> int | None:
    """Returns how many positions a model has for tokens, None without a limit; its weights are not loaded.

    Raises:
        ModelError: There is no such model, or it brings code that was not allowed.
    """
    if options.head is not None:
        return positions(load_shapes(name, options))
    limit: int | None = getattr(load_config(name, options).get_text_config(), "max_position_embeddings", None)
    return limit


def load_shapes(name: str, options: LoadOptions) -> PreTrainedModel:
    """Returns a model without weights, on the meta device.

    Raises:
        ModelError: There is no such model, or it brings code that was not allowed.
    """
    with torch.device("meta"):
        return _from_config(name, options)


def load_places(name: str, options: LoadOptions, dtype: torch.dtype) -> PreTrainedModel:
    """Returns a model whose weights are not set, for a process that gets them from another one; buffers are.

    Weights have a place of a dtype on the CPU, which takes no memory until it is written to.

    Raises:
        ModelError: As of :func:`load_shapes`.
    """
    with init_empty_weights(include_buffers=False):
        model = _from_config(name, options, dtype=dtype)
    for parameter in model.parameters():
        held = nn.Parameter(torch.empty_like(parameter, device="cpu"))
        torch.utils.swap_tensors(parameter, held)  # type: ignore[no-untyped-call]
    model.tie_weights()  # which every parameter of its own undid
    return model.eval()


def _from_config(name: str, options: LoadOptions, **fields: Any) -> PreTrainedModel:
    config = load_config(name, options)
    kind: Any = AutoModelForCausalLM if options.head is None else AutoModelForSequenceClassification
    with _explained(name):
        model: PreTrainedModel = kind.from_config(config, trust_remote_code=options.trust_remote_code, **fields)
    return model


def refuse_not_finite(model: PreTrainedModel) -> None:
    """Checks that every weight is finite.

    Raises:
        ModelError: A weight is NaN or infinite; the message names the parameter.
    """
    # Of packed weights, which may claim to be floats, the scales that they are multiplied by.
    packed = {name for name, parameter in model.named_parameters() if get_bnb_param_type(parameter)}
    quantised = is_quantised(model)
    for name, parameter in (model.state_dict() if quantised else dict(model.named_parameters())).items():
        if quantised and (name in packed or not parameter.is_floating_point() or parameter.itemsize == 1):
            continue
        place = f"model {model.name_or_path or type(model).__name__}, parameter {name}"
        need_finite(stored_value(model, name, parameter).isfinite(), place, "weights")


_TOKENIZER_FILES = ("*token*", "*vocab*", "*.model")


def load_tokenizer(name: str, options: LoadOptions = _DEFAULTS) -> PreTrainedTokenizerBase:
    """Loads the tokenizer; one without a padding token pads with its end of text.

    Padding is always masked here, so which token pads changes nothing.

    Raises:
        ModelError: There is no tokenizer, or it has neither a padding nor an end token.
        DataError: Its chat template does not end.
    """
    if is_gguf(name):
        check_gguf(name)
    place, file = place_of(name)
    if Path(place).is_dir() and not file and not any(any(Path(place).glob(one)) for one in _TOKENIZER_FILES):
        got, wanted = "a folder without a tokenizer", "tokenizer.json or another tokenizer's files beside the weights"
        step = "Copy the files of the tokenizer that the model was trained with into it."
        raise ModelError(f"model {name}", got=got, wanted=wanted, next_step=step)
    with _explained(name):
        tokenizer = AutoTokenizer.from_pretrained(place, **file, **options.source, use_fast=True)
    refuse_endless(tokenizer, f"model {name}")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ModelError(
                name,
                got="a tokenizer without padding and end-of-text tokens",
                wanted="at least one of them",
                next_step="Set pad_token or eos_token in tokenizer_config.json.",
            )
        tokenizer.pad_token = tokenizer.eos_token
    loaded: PreTrainedTokenizerBase = tokenizer
    return loaded


def _check_folder(name: str, allow_pickle: bool) -> None:
    if is_gguf(name):
        check_gguf(name)
        return
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if name.startswith((".", "/", "~")) or name.count("/") > 1:
            raise not_there(f"model {name}", "folder", "a model folder or a hub id such as org/name", ModelError)
        return
    if not (folder / "config.json").is_file():
        raise ModelError(
            f"model {name}",
            got="a folder without config.json",
            wanted="a Transformers model folder",
            next_step="An adapter folder goes to --adapter; the model is its base.",
        )
    check_counts(folder / "config.json")
    if not any(folder.glob("*.safetensors")) and not (allow_pickle and any(folder.glob("*.bin"))):
        pickled = sorted(p.name for p in folder.glob("*.bin"))
        raise ModelError(
            f"model {name}",
            got=f"pickled weights only ({', '.join(pickled)})" if pickled else "a folder without weights",
            wanted="model.safetensors",
            next_step="Convert the weights with save_pretrained, or set allow_pickle: true if you trust them."
            if pickled
            else "Copy the weights into the folder.",
        )


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Explains what Transformers raises for files of another form, or weights of other shapes than the config says."""
    try:
        yield
    except _REFUSALS as error:
        raise _cannot_load(name, error) from error


def _cannot_load(name: str, error: Exception) -> ModelError:
    if is_gguf(name) and not isinstance(error, OSError):  # not the network
        return gguf_error(name, error)
    text: Any = str(error).strip().split("\n")[0]
    if isinstance(error, RuntimeError) and "ignore_mismatched_sizes" in text:
        text = "the weights have other shapes than config.json says"
    return ModelError(
        f"model {name}",
        got=f"{type(error).__name__}: {text}",
        wanted="a model that Transformers loads from safetensors",
        next_step="Check the name and the network; remote code runs only with trust_remote_code: true.",
    )


def load_offloaded(name: str, options: LoadOptions) -> PreTrainedModel:
    """Loads a model whose weights stay on disk: a call of a module reads them, and drops them afterwards.

    Where they are as the model needs them, they are read from its own files. Others, such as the experts that
    Transformers fuses, are written in a temporary folder (that of ``TMPDIR``) that is removed with the model. A drawn
    head is on the device, where modules run.

    Raises:
        ModelError: As ``load_model``, or the model cannot be read in parts, as one quantised by bitsandbytes.
    """
    places: dict[str, Any] = {"": "disk"}
    if options.head is not None:  # which may have been drawn
        shapes = load_shapes(name, options)
        places = {part: options.device if part in head_of(shapes) else "disk" for part, _ in shapes.named_children()}
    folder = tempfile.TemporaryDirectory(prefix="keeptune-offload-")
    with ExitStack() as failed:
        failed.callback(folder.cleanup)
        model = load_weights(name, options, device_map=places, offload_folder=folder.name)
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
