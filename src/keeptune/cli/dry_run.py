"""--dry-run: what a run, each method of a comparison or each stage of a sequence would fetch, train and score."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

__all__ = ["dry_run"]


def dry_run(recipe: Path, overrides: Mapping[str, Any], flops: float | None) -> None:
    """Print the account of a recipe; nothing is fetched and nothing is written.

    Args:
        recipe: The YAML file, with or without ``compare`` or ``stages``.
        overrides: Dotted key to value.
        flops: Operations a second that times rest on; None measures this machine's matrix products.

    Raises:
        KeeptuneError: The recipe could not run, as far as that shows without the data.
    """
    from keeptune.cli.dry_run_accounts import describe_file
    from keeptune.pipeline.dry_run.show import print_several, stated_rate
    from keeptune.pipeline.machine import device_named

    described = describe_file(recipe, overrides)
    rate, rate_from = stated_rate(flops, device_named(described.device))
    print_several(described.parts, Console(), rate=rate, rate_from=rate_from)
