"""What a recipe's file would fetch, train and score, be it of one run, of a comparison or of a sequence of stages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from keeptune.core.artefact import content_key
from keeptune.core.errors import placed
from keeptune.data import hub
from keeptune.experiments.comparison.cells import Cell, grid, load_comparison
from keeptune.experiments.sequence.schema import load_sequence
from keeptune.pipeline.dry_run.account import DryRun, Part
from keeptune.pipeline.dry_run.describe import describe
from keeptune.pipeline.dry_run.model_shapes import ModelShape
from keeptune.recipe.reading import read_values
from keeptune.recipe.schema import Recipe, load_recipe

__all__ = ["Account", "describe_file"]


@dataclass(frozen=True)
class Account:
    """What a file would do.

    Args:
        parts: One run, or each method and strength of a comparison, or each stage.
        device: What the recipe says of it.
    """

    parts: tuple[Part, ...]
    device: str


def describe_file(path: Path | str, overrides: Mapping[str, Any] | None = None) -> Account:
    """Say what the runs of a recipe would fetch, train and score, and what they would take; nothing is fetched.

    Args:
        path: The YAML file.
        overrides: Dotted key to value.

    Returns:
        The account.

    Raises:
        KeeptuneError: The recipe could not run, as far as that shows without the data.
    """
    values = read_values(Path(path), overrides)
    if "compare" in values:
        comparison = load_comparison(path, overrides, fetch=hub.cached)
        return _account(_settings(grid(comparison)))
    if "stages" in values:
        stages = load_sequence(path, overrides, fetch=hub.cached).stages
        return _account([(f"stage {stage.name}", stage.recipe, 1) for stage in stages])
    return _account([("", load_recipe(path, overrides, fetch=hub.cached), 1)])


def _settings(cells: Iterable[Cell]) -> list[tuple[str, Recipe, int]]:
    """Put cells together that differ in rate and seed alone: they take the same."""
    found: dict[str, list[Cell]] = {}
    for cell in cells:
        varied = {key: value for key, value in cell.settings.items() if key != "train.learning_rate"}
        found.setdefault(content_key([cell.label, varied]), []).append(cell)
    firsts = [own[0] for own in found.values()]
    several = {cell.label for cell in firsts if [one.label for one in firsts].count(cell.label) > 1}
    return [
        (f"{own[0].label}, {own[0].name}" if own[0].label in several else own[0].label, own[0].recipe, len(own))
        for own in found.values()
    ]


def _account(runs: Sequence[tuple[str, Recipe, int]]) -> Account:
    parts: list[Part] = []
    shape: ModelShape | None = None
    for name, recipe, count in runs:
        described: DryRun = placed(name, partial(describe, recipe, shape)) if name else describe(recipe)
        shape = described.shape
        parts.append(Part(name, count, described))
    return Account(tuple(parts), runs[0][1].device)
