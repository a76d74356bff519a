"""LLaMA-Factory's training with a section ``keeptune:`` in its YAML file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keeptune.core.errors import RecipeError
from keeptune.hosts.section import callback_of
from keeptune.recipe.reading import read_values


def run_llamafactory(path: Path, overrides: Mapping[str, Any] | None = None) -> None:
    """Runs LLaMA-Factory on a file of its own, without the section that is keeptune's, and with the callback.

    Args:
        path: Its YAML file, with a section ``keeptune:``.
        overrides: Dotted key to value, such as ``{"learning_rate": 1e-4}``.

    Raises:
        RecipeError: The section is missing or wrong, or LLaMA-Factory is not installed.
    """
    values = read_values(path, overrides)
    callback = callback_of(values.pop("keeptune", None), f"{path}, key keeptune")
    try:
        from llamafactory.train.tuner import run_exp
    except ModuleNotFoundError as error:
        raise RecipeError(
            "keeptune llamafactory",
            got=f"no module {error.name}",
            wanted="LLaMA-Factory, installed beside keeptune",
            next_step="Run `pip install llamafactory` (docs/guides/hosts.md says with which versions).",
        ) from error
    run_exp(args=values, callbacks=[callback])
