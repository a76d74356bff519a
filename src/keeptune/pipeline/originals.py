"""The original of a quantised base, in floats: which it is, that it is at hand where asked for, its weights."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from keeptune.core.errors import PlanError, RecipeError
from keeptune.core.target import Target
from keeptune.core.weights import is_quantised, read_weight
from keeptune.methods.base import Method
from keeptune.model.gguf import is_gguf
from keeptune.model.pretrained import LoadOptions, StartFrom, load_config, load_floats
from keeptune.model.quantization import stays_quantised, stored_quantization
from keeptune.recipe.schema import Recipe
from keeptune.statistics.covariance import DirectionVariances

# Weights quantised to two bits are off by up to 0.5, those of another model by 1.4 (relative, Frobenius).
_UNRELATED = 0.7
_SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "vocab_size")


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
