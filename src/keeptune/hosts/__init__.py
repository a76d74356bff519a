"""keeptune inside the trainers that users already have."""

from typing import Any


def __getattr__(name: str) -> Any:
    """Imports the plugin where Axolotl asks for it: ``plugins: [keeptune.hosts.AxolotlPlugin]``."""
    if name == "AxolotlPlugin":
        from keeptune.hosts.programs import axolotl_plugin

        return axolotl_plugin()
    raise AttributeError(f"module keeptune.hosts has no attribute {name}")
