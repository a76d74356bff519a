"""The versions of hosts that keeptune was run in."""

from __future__ import annotations

import logging
import sys
from importlib.metadata import PackageNotFoundError, version

_log = logging.getLogger(__name__)
# Modules of hosts, their packages, and the versions that were run (docs/guides/hosts.md).
_RUN = {
    "axolotl": ("axolotl", "0.21"),
    "llamafactory": ("llamafactory", "0.9"),
    "swift": ("ms-swift", "4.6"),
    "unsloth": ("unsloth", "2026.10"),
}


def warn_untried() -> None:
    """Logs a warning for each host at work here that is of another version than was run."""
    for package, run in (_RUN[module] for module in _RUN.keys() & sys.modules.keys()):
        try:
            found = version(package)
        except PackageNotFoundError:  # a module of that name, of no package
            continue
        if not f"{found}.".startswith(f"{run}."):
            _log.warning("keeptune: %s %s: only %s.x was run (docs/guides/hosts.md)", package, found, run)
