"""The base as plans read it: whole or block by block, as memory is, and its original in floats if it is quantised."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, Literal, get_args

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor
from transformers import PreTrainedModel

from keeptune.core.errors import ModelError, PlanError, RecipeError, need_known
from keeptune.core.offload import is_offloaded
from keeptune.core.processes import gathered, on_machine
from keeptune.core.target import Target
from keeptune.core.weights import is_quantised, read_weight
from keeptune.methods.base import Method
from keeptune.model.blocks import blocks_of
from keeptune.model.blockwise import BlockwiseRunner
from keeptune.model.pretrained import (
    LoadOptions,
    StartFrom,
    load_config,
    load_floats,
    load_model,
    load_offloaded,
    load_shapes,
)
from keeptune.model.quantization import is_gguf, stays_quantised, stored_quantization
from keeptune.model.runner import Runner
from keeptune.recipe.schema import Recipe
from keeptune.statistics.covariance import DirectionVariances
from keeptune.statistics.request import Request, RowRequest

_log = logging.getLogger(__name__)
Memory = Literal["resident", "blockwise", "auto"]
_SHARE = 0.8  # of the free memory: the rest is for activations
# Weights quantised to two bits are off by up to 0.5, those of another model by 1.4 (relative, Frobenius).
_UNRELATED = 0.7
_SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")


def free_bytes(device: torch.device) -> int:
    """Returns how much memory of a device is free; of the CPU, the host's, which its processes share.

    Of several processes it is the least, so that all decide alike.
    """
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = int(torch.cuda.mem_get_info(device)[0]) + cached
    else:
        free = int(psutil.virtual_memory().available) // on_machine()[1]
    return min(gathered(free))


def is_packed(name: str, options: LoadOptions) -> bool:
    """Returns whether a base is quantised, by the recipe or as it is stored, or a GGUF file."""
    return bool(options.quantization) or is_gguf(name) or stored_quantization(load_config(name, options)) is not None


def load_base(name: str, options: LoadOptions, memory: Memory) -> PreTrainedModel:
    """Loads a base for statistics and plans: whole, or with its weights on disk until a block needs them.

    Quantised bases are loaded whole, under ``"blockwise"`` on the CPU, from where their blocks move to the device.

    Raises:
        ModelError: As of ``load_model``.
    """
    if is_packed(name, options):
        return load_model(name, replace(options, device="cpu") if memory == "blockwise" else options)
    if memory == "auto":
        device = torch.device(options.device)
        needed, free = sum(p.nbytes for p in load_shapes(name, options).parameters()), free_bytes(device)
        memory = "resident" if needed <= _SHARE * free else "blockwise"
        _tell("plan", memory, "weights", needed, free, device)
    return load_model(name, options) if memory == "resident" else load_offloaded(name, options)


def placed_runner(
    runner: Runner, requests: Mapping[Target, frozenset[Request]], memory: Memory, device: str | None
) -> tuple[Runner, int | None]:
    """Returns what passes data through the model, and how many bytes sums may take at a time (None: those of a pass).

    Raises:
        RecipeError: ``memory`` is none of the three.
    """
    need_known(memory, get_args(Memory), "memory", "resident, blockwise or auto")
    sites = {(r, r.site(t)): r.numbers(t) for t, own in requests.items() for r in own if isinstance(r, RowRequest)}
    sums, free = 8 * sum(sites.values()), free_bytes(runner.device)
    room = int(_SHARE * free)
    if memory == "auto" and sites:
        memory = "blockwise" if (is_offloaded(runner.model) or sums > room) and _is_stack(runner.model) else "resident"
        _tell("statistics", memory, "sums", sums, free, runner.device)
    if memory != "blockwise":
        return runner, room if sums > room else None
    place = None if device is None else torch.device(device)
    return (runner if isinstance(runner, BlockwiseRunner) else BlockwiseRunner(runner.model, place)), None


def _tell(stage: str, memory: Memory, what: str, needed: int, free: int, device: torch.device) -> None:
    sizes = f"{what} of {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB free"
    _log.info("%s: memory auto takes %s: %s on %s", stage, memory, sizes, device)


def _is_stack(model: PreTrainedModel) -> bool:
    try:
        blocks_of(model)
    except ModelError:
        return False
    return True


def original_of(recipe: Recipe, config: Any) -> str | None:
    """Returns the path or hub id of what a recipe's base was before it was quantised.

    Args:
        recipe: A base that is quantised as it is loaded is its own original; of others ``original`` names it.
        config: The base's config.

    Returns:
        None for a base that is not quantised, and where the original is not at hand.
    """
    if recipe.original is not None:
        return recipe.original
    return recipe.model if stored_quantization(config) is None and stays_quantised(recipe.quantization) else None


def check_original(recipe: Recipe, config: Any, options: LoadOptions) -> None:
    """Checks the original of a base.

    Args:
        recipe: The recipe.
        config: The base's config; None checks what shows without it.
        options: How the original is loaded.

    Raises:
        RecipeError: It is asked for and not named, or named for a base that is not quantised.
        ModelError: There is no such model.
    """
    quantised = stays_quantised(recipe.quantization, config)
    asked = {
        "start_from": "original" if recipe.start_from == "original" else "",
        "export.check_original": "true" if recipe.export.check_original else "",
        "export.format": "merged" if quantised and recipe.export.format == "merged" else "",
    }
    key = next((key for key, value in asked.items() if value), None)
    if key is not None and original_of(recipe, config) is None:
        raise RecipeError(
            f"recipe, key {key}",
            got=f"{asked[key]} without the original weights of {recipe.model}",
            wanted="a base that is quantised as it is loaded, or `original:`, the model that was quantised",
            next_step="Add `original: org/name`, or leave the key out.",
        )
    if recipe.original is None or config is None:
        return
    if not quantised and not is_gguf(recipe.model):
        raise RecipeError(
            "original",
            got=f"{recipe.original} for the base {recipe.model}, which is not quantised",
            wanted="none: the base is its own original",
            next_step="Leave `original` out.",
        )
    own = load_config(recipe.original, options)
    differ = [key for key in _SHAPE if _of(own, key) != _of(config, key)]
    if differ or stays_quantised(None, own):
        raise RecipeError(
            "original",
            got=f"{recipe.original}, " + (f"of another {differ[0]}" if differ else "which is quantised itself"),
            wanted=f"the weights in floats that {recipe.model} was quantised from",
            next_step="Name that model.",
        )


def _of(config: Any, key: str) -> Any:
    value = getattr(config.get_text_config(), key, None)
    return value.removesuffix("_text") if isinstance(value, str) else value


def weight_reader(
    model: PreTrainedModel, method: Method, start_from: StartFrom, original: PreTrainedModel | str | None
) -> Callable[[Target], Tensor]:
    """Returns what reads a target's W for a method, one at a time.

    Args:
        model: The base, which may be quantised.
        method: The method.
        start_from: Which weights.
        original: The base before it was quantised, by path or hub id, or loaded; its weights may be on disk.

    Raises:
        PlanError: The original is wanted and not given, or the method has statistics taken along the directions of the
            weights that the model computes with.
    """
    if start_from == "quantised":
        return partial(read_weight, model)
    if start_from != "original" or original is None:
        raise PlanError(
            "start_from",
            got=f'"{start_from}"' + (" without the original" if start_from == "original" else ""),
            wanted='"quantised", or "original" and the base before it was quantised',
            next_step="Set PlanOptions.original (in a recipe `original:`) to its path or hub id.",
        )
    if any(isinstance(request, DirectionVariances) for request in method.statistics):
        raise PlanError(
            f"method {method.name}",
            got="start_from: original",
            wanted="quantised: its statistics are taken along the directions of the model's own weights",
            next_step="Leave `start_from` out, or let the method take whole covariances.",
        )
    whole = load_floats(original, LoadOptions(device=model.device)) if isinstance(original, str) else original
    if is_quantised(whole):
        raise PlanError("start_from", got="an original that is quantised", wanted="floats", next_step="Name another.")
    return partial(_original, whole, model)


def _original(whole: PreTrainedModel, model: PreTrainedModel, target: Target) -> Tensor:
    """Reads W of the original, held against what it was quantised to."""
    W, near = read_weight(whole, target), read_weight(model, target)
    apart = float((W.to(near.device) - near).norm() / W.norm()) if W.shape == near.shape else float("inf")
    if not apart <= _UNRELATED:
        raise PlanError(
            f"start_from: original, {target.name}",
            got=f"weights that are not near those of the quantised base (relative difference {apart:.2f})",
            wanted=f"the model that the base was quantised from, not {whole.name_or_path}",
            next_step="Name it with `original:`.",
        )
    return W
