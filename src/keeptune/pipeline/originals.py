"""The original of a quantised base, in floats: which it is, and that it is at hand where a recipe asks for it."""

from __future__ import annotations

from typing import Any

from keeptune.core.errors import RecipeError
from keeptune.model.gguf import is_gguf
from keeptune.model.pretrained import LoadOptions, load_config
from keeptune.model.quantization import stays_quantised, stored_quantization
from keeptune.recipe.schema import Recipe

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


def refuse_without_original(recipe: Recipe) -> None:
    """Raises RecipeError for a recipe that asks for an original and names none, whatever its base is."""
    asked = _asked(recipe)
    if asked and recipe.original is None and not stays_quantised(recipe.quantization):
        raise _not_at_hand(asked[0], recipe)


def check_original(recipe: Recipe, config: Any, options: LoadOptions) -> None:
    """Checks the original of a base.

    Args:
        recipe: The recipe.
        config: The base's config.
        options: How the original is loaded.

    Raises:
        RecipeError: It is asked for and not named, or named for a base that is not quantised.
        ModelError: There is no such model.
    """
    quantised = stays_quantised(recipe.quantization, config)
    original = original_of(recipe, config)
    asked = _asked(recipe)
    if quantised and recipe.export.format == "merged":
        asked.append("export.format")
    if asked and original is None:
        raise _not_at_hand(asked[0], recipe)
    if recipe.original is None:
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


def _asked(recipe: Recipe) -> list[str]:
    keys = {"start_from": recipe.start_from == "original", "export.check_original": recipe.export.check_original}
    return [key for key, asked in keys.items() if asked]


def _of(config: Any, key: str) -> Any:
    value = getattr(config.get_text_config(), key, None)
    return value.removesuffix("_text") if isinstance(value, str) else value


def _not_at_hand(key: str, recipe: Recipe) -> RecipeError:
    value = {"start_from": "original", "export.format": "merged"}.get(key, "true")
    return RecipeError(
        f"recipe, key {key}",
        got=f"{value} without the original weights of {recipe.model}",
        wanted="a base that is quantised as it is loaded, or `original:`, the model that was quantised",
        next_step="Add `original: org/name`, or leave the key out.",
    )
