"""Axolotl's plugin: ``plugins: [keeptune.hosts.AxolotlPlugin]`` and a section ``keeptune:`` in its YAML file."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel

from keeptune.hosts.section import HostSection, callback_of


class AxolotlArgs(BaseModel):
    """What the plugin adds to Axolotl's own keys."""

    keeptune: HostSection


def axolotl_plugin() -> type[Any]:
    """Returns the plugin's class, on the base class of the Axolotl that is installed."""
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
