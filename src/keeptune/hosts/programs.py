"""Hosts that are programs: Axolotl's plugin, and LLaMA-Factory with a section ``keeptune:`` in its YAML file."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from keeptune.core.errors import RecipeError
from keeptune.hosts.section import HostSection, callback_of
from keeptune.recipe.reading import read_values


class AxolotlArgs(BaseModel):
    """What the plugin adds to Axolotl's own keys."""

    keeptune: HostSection


def axolotl_plugin() -> type[Any]:
    """Returns the class of ``plugins: [keeptune.hosts.AxolotlPlugin]``, on the base class of this Axolotl."""
    from axolotl.integrations.base import BasePlugin

    class AxolotlPlugin(BasePlugin):
        """Adds the callback to the trainer that Axolotl makes."""

        def get_input_args(self) -> str:
            """Returns the name of the model of its keys."""
            return f"{__name__}.{AxolotlArgs.__name__}"

        def add_callbacks_pre_trainer(self, cfg: Any, model: Any) -> list[Any]:
            """Returns the callback."""
            return [callback_of(cfg["keeptune"], "axolotl, key keeptune")]

    return AxolotlPlugin


def run_llamafactory(path: Path, overrides: Mapping[str, Any] | None = None) -> None:
    """Runs LLaMA-Factory on a file of its own, without the section that is keeptune's, and with the callback.

    Args:
        path: Its YAML file, with a section ``keeptune:``.
        overrides: Dotted key to value, such as ``{"learning_rate": 1e-4}``.

    Raises:
        KeeptuneError: The section is missing or wrong, or LLaMA-Factory is not installed.
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
