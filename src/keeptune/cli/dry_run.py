"""--dry-run: what a run, each method of a comparison or each stage of a sequence would fetch, train and score."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from keeptune.pipeline.dry_run.describe import DryRun
    from keeptune.recipe.schema import Recipe


def dry_run(
    recipe: Path, overrides: Mapping[str, Any], flops: float | None, *, as_json: bool = False
) -> dict[str, Any]:
    """Prints the account of a recipe; nothing is fetched and nothing is written.

    Args:
        recipe: The YAML file, with or without ``compare`` or ``stages``.
        overrides: Dotted key to value.
        flops: Operations a second that times rest on; None measures this machine's matrix products.
        as_json: Nothing is printed, and so this machine not measured.

    Returns:
        Bytes and operations: of one run, or ``runs`` by name, each with how often it runs.

    Raises:
        KeeptuneError: The recipe could not run, as far as that shows without the data.
    """
    from keeptune.pipeline.dry_run.show import print_accounts
    from keeptune.pipeline.machine import device_named

    runs = describe_file(recipe, overrides)
    if not as_json:
        device = next(iter(runs.values()))[1].job.recipe.device
        print_accounts(runs, Console(), flops=flops, device=device_named(device))
    accounts = {name: {"times": times, **account.plain()} for name, (times, account) in runs.items()}
    return runs[""][1].plain() if "" in runs else {"runs": accounts}


def describe_file(path: Path | str, overrides: Mapping[str, Any] | None = None) -> dict[str, tuple[int, DryRun]]:
    """Returns what the runs of a recipe would fetch, train and score, and what they would take; nothing is fetched.

    Returns:
        Name of a method of a comparison or of a stage (empty for the run of a recipe) to how often it runs, over
        rates and seeds, and the account of one run.

    Raises:
        KeeptuneError: The recipe could not run, as far as that shows without the data.
    """
    from keeptune.core.errors import placed
    from keeptune.data import hub
    from keeptune.experiments.plan_runs import by_setting, list_runs, load_comparison
    from keeptune.experiments.sequence.stages_section import load_sequence
    from keeptune.pipeline.dry_run.describe import describe
    from keeptune.recipe.reading import read_values
    from keeptune.recipe.schema import load_recipe

    values = read_values(Path(path), overrides)
    recipes: dict[str, tuple[int, Recipe]] = {}
    if "compare" in values:
        # Runs that differ in rate and seed alone take the same.
        groups = by_setting(list_runs(load_comparison(path, overrides, fetch=hub.cached)))
        labels = [specs[0].label for specs in groups]
        for specs, label in zip(groups, labels, strict=True):
            name = f"{label}, {specs[0].name}" if labels.count(label) > 1 else label
            recipes[name] = len(specs), specs[0].recipe
    elif "stages" in values:
        stages = load_sequence(path, overrides, fetch=hub.cached).stages
        recipes |= {f"stage {stage.name}": (1, stage.recipe) for stage in stages}
    else:
        return {"": (1, describe(load_recipe(path, overrides, fetch=hub.cached)))}
    runs: dict[str, tuple[int, DryRun]] = {}
    for name, (times, recipe) in recipes.items():
        shape = next(iter(runs.values()))[1].shape if runs else None
        runs[name] = times, placed(name, partial(describe, recipe, shape))
    return runs
