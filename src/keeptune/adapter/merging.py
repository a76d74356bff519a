"""merge: an adapter and its base, which may be larger than memory, to one whole model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import set_module_tensor_to_device
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from keeptune.adapter.load import SIDECAR, load_adapter, read_config, refuse_foreign, tensor_names, write_tokenizer
from keeptune.adapter.probe import BOUNDS, Gap, logits_of, random_probe
from keeptune.adapter.trained_head import is_tied
from keeptune.core.artefact import atomic_directory, seal, write_json
from keeptune.core.errors import ExportError, ModelError
from keeptune.core.offload import edit_values, is_offloaded, save_model

PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")  # others take a part out of the base when loaded
_MORE = (
    "use_dora",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "lora_bias",
)


def is_streamed(adapter: Path) -> bool:
    """Returns whether an adapter can be merged weight by weight: it only adds to linear maps, and brings none along."""
    config = read_config(adapter)
    plain = config.get("peft_type") == "LORA" and config.get("init_lora_weights") in PLAIN_STARTS
    plain = plain and not any(config.get(key) for key in _MORE)
    return plain and all(".lora_" in name for name in tensor_names(adapter))


def merge(
    adapter: Path | str,
    folder: Path | str,
    *,
    base: str,
    load: Callable[[str], PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase | None = None,
    ends: Collection[int | None] = (),
) -> Gap:
    """Merges any LoRA adapter that PEFT loads into a fresh base, writes the whole model, and returns its gap in logits.

    The model is loaded again and checked against the adapter on its base, as an export is.

    Args:
        adapter: The adapter's folder.
        folder: Where the model goes.
        base: Path or hub id of the base, in floats.
        load: Loads a model, with its weights on disk where the merge is to be streamed (:func:`is_streamed`).
        tokenizer: Saved along when given.
        ends: As of :func:`keeptune.adapter.load.write_tokenizer`.

    Raises:
        ModelError: The adapter does not fit the base.
        ExportError: The folder holds something else, or the merged model does not compute what the adapter does.
    """
    folder = Path(folder)
    refuse_foreign(folder)
    if (folder / "adapter_config.json").is_file():
        raise ExportError(
            f"merge to {folder}",
            got="an adapter there",
            wanted="a folder for a whole model",
            next_step="Choose another.",
        )
    wrapped = load_adapter(load(base), Path(adapter))
    probe = random_probe(wrapped)
    wanted = logits_of(wrapped, probe)
    merged = _merged(wrapped, Path(adapter))
    with atomic_directory(folder) as fresh:
        save_model(merged, fresh)
        product = load(str(fresh))
        gap, bound = Gap.between(logits_of(product, probe), wanted), BOUNDS[product.dtype]
        advice = "Check the adapter's weights, or merge with --dtype float32. Nothing was written."
        gap.refuse_above(bound, f"merge to {folder}", "the adapter on its base", advice)
        if tokenizer is not None:
            write_tokenizer(tokenizer, product, fresh, ends)
        write_json(fresh / SIDECAR, {"base": base, "gap": gap.gap, "relative_gap": gap.relative})
        seal(fresh, {"format": "merged"})
    return gap


def merged_by_peft(wrapped: PeftModel, folder: Path) -> PreTrainedModel:
    """Merges an adapter that PEFT merges, of any kind; ModelError for others."""
    try:
        return wrapped.merge_and_unload()
    # AttributeError: prompt tuning and its like have nothing to merge; the others: a kind, a base or a setting (a bias
    # where the base has none) that PEFT does not merge.
    except (AttributeError, ValueError, NotImplementedError, RuntimeError) as error:
        kind = wrapped.peft_config["default"].peft_type
        raise ModelError(
            f"adapter {folder}",
            got=f"an adapter of type {getattr(kind, 'value', kind)}, which PEFT does not merge into weights ({error})",
            wanted="an adapter that changes weights: LoRA, DoRA or another that can be merged",
            next_step="Serve it beside its base, or measure another one.",
        ) from error


def _merged(wrapped: PeftModel, folder: Path) -> PreTrainedModel:
    """Returns the base with an adapter merged by PEFT; of a base on disk, each weight when it is read."""
    inner = wrapped.get_base_model()
    if _untie(inner):
        inner.config.get_text_config().tie_word_embeddings = inner.config.tie_word_embeddings = False
        inner.all_tied_weights_keys = {}
    if not is_offloaded(wrapped):
        with warnings.catch_warnings():  # of what has just been untied on purpose
            warnings.filterwarnings("ignore", "Input and output embeddings are no longer tied|Model with `tie_word_emb")
            return merged_by_peft(wrapped, folder)
    layers = {name: layer for name, layer in inner.named_modules() if isinstance(layer, BaseTunerLayer)}
    for name, layer in layers.items():  # PEFT's unload() would hold all weights in memory
        inner.set_submodule(name, layer.get_base_layer())
    edit_values(inner, {f"{name}.weight": [partial(_merge, layer)] for name, layer in layers.items()})
    return inner


def _untie(base: Any) -> bool:
    """Gives the head and the embedding a weight each where a LoRA changes one of two that are tied."""
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    if not is_tied(base) or not any(isinstance(module, LoraLayer) for module in (head, embedding)):
        return False
    own = head.get_base_layer() if isinstance(head, LoraLayer) else head
    if not own.weight.is_meta:  # on disk each is read for itself
        own.weight = nn.Parameter(own.weight.detach().clone(), requires_grad=False)
    return True


def _merge(layer: Any, stored: Tensor) -> None:
    base = layer.get_base_layer()
    set_module_tensor_to_device(base, "weight", stored.device, value=stored)
    layer.merge()
    layer.merged_adapters.clear()
    stored.copy_(base.weight)
    set_module_tensor_to_device(base, "weight", "meta")
