"""From a recipe with a ``compare:`` section to its cells, each an ordinary run, all checked before the first."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from keeptune.core.artefact import content_key
from keeptune.core.errors import RecipeError, placed
from keeptune.data import hub
from keeptune.experiments.comparison.axes import axes_of
from keeptune.experiments.comparison.entries import Entry, Variation, read_entries, short, slug
from keeptune.experiments.comparison.section import CompareSection, read_section
from keeptune.methods.combined import tuned_roles
from keeptune.model.blocks import find_targets
from keeptune.pipeline.job import Job
from keeptune.recipe.construct import make_method, make_penalties
from keeptune.recipe.paths import Fetch
from keeptune.recipe.reading import read_values, set_value
from keeptune.recipe.schema import Recipe, make_recipe

__all__ = ["FOLDER", "Cell", "Comparison", "cell_of", "check_cells", "grid", "load_comparison", "refuse_equal"]

FOLDER = "cells"


@dataclass(frozen=True)
class Cell:
    """One run of a comparison.

    Args:
        name: Its folder's name, without the seed the name of its setting.
        label: What it is compared as.
        method: Its method.
        settings: Dotted recipe key to value: what it changes, but for the seed.
        learning_rate: Its rate.
        strength: The factor on the method's own strength; None where it has none.
        seed: Its seed.
        recipe: The run's recipe.
    """

    name: str
    label: str
    method: str
    settings: Mapping[str, Any]
    learning_rate: float
    strength: float | None
    seed: int
    recipe: Recipe


@dataclass(frozen=True)
class Comparison:
    """A recipe with its ``compare:`` section.

    Args:
        path: The recipe's file.
        values: The recipe without the section, as the file holds it.
        section: The section.
        entries: What is compared, the baselines among it.
        plain: Label of plain LoRA, which the others are set against; None where there is none.
        base: The recipe without the section and without method, checked.
        fetch: Gets the files of the hub.
    """

    path: Path
    values: Mapping[str, Any]
    section: CompareSection
    entries: tuple[Entry, ...]
    plain: str | None
    base: Recipe
    fetch: Fetch = hub.fetch

    @property
    def output(self) -> Path:
        """Where cells, records and the page go."""
        return self.base.output

    @property
    def where(self) -> str:
        """For error messages."""
        return f"recipe {self.path}"


def load_comparison(
    path: Path | str, overrides: Mapping[str, Any] | None = None, *, fetch: Fetch = hub.fetch
) -> Comparison:
    """Read a recipe with a ``compare`` section.

    Args:
        path: The YAML file.
        overrides: Dotted key to value, of the recipe or the section: ``{"compare.seeds": [0, 1]}``.
        fetch: Gets the files of the hub.

    Returns:
        The comparison; its cells are not checked with data and model yet.

    Raises:
        RecipeError: A key is unknown or a value does not fit.
    """
    path = Path(path)
    values = read_values(path, overrides)
    where = f"recipe {path}"
    section = read_section(values, where)
    del values["compare"]
    if "method" in values:
        raise RecipeError(
            f"{where}, key method",
            got="a method beside compare.methods",
            wanted="methods in the `compare` section alone",
            next_step="Move it to compare.methods.",
        )
    rates = section.learning_rate or _own_rate(values, where)
    entries, plain = read_entries(section, values, rates, where)
    base = make_recipe(values, folder=path.parent, where=where, fetch=fetch)
    if base.published is not None:
        base.published.check_labels([entry.label for entry in entries], where)
    # The metric of a standard benchmark, always a share, is known when it is scored.
    scored = [
        {"name": b.name, "role": b.role, "metric": getattr(b, "metric", None) or "accuracy"} for b in base.evaluate
    ]
    if len({b["role"] for b in scored}) == 2:  # a published table may score one side alone: it has no trade-off
        placed(where, partial(axes_of, scored, section.learned, section.forgotten))
    return Comparison(path, values, section, entries, plain, base, fetch)


def _own_rate(values: Mapping[str, Any], where: str) -> list[float]:
    train = values.get("train")
    rate = train.get("learning_rate") if isinstance(train, Mapping) else None
    if not isinstance(rate, int | float):
        raise RecipeError(
            f"{where}, key compare.learning_rate",
            got="nothing",
            wanted="learning rates: methods are compared each at its best",
            next_step="Example: learning_rate: [5e-4, 1e-3, 2e-3].",
        )
    return [float(rate)]


def grid(comparison: Comparison) -> tuple[Cell, ...]:
    """List every run of the grid, entry by entry.

    Args:
        comparison: The comparison.

    Returns:
        The cells.

    Raises:
        RecipeError: A setting does not fit, or two cells would be the same run.
    """
    cells = tuple(
        cell_of(comparison, entry, variation, rate, seed)
        for entry in comparison.entries
        for variation in entry.variations
        for rate in entry.rates
        for seed in comparison.section.seeds
    )
    refuse_equal(cells, comparison.where)
    return cells


def cell_of(comparison: Comparison, entry: Entry, variation: Variation, rate: float, seed: int) -> Cell:
    """Make one cell.

    Args:
        comparison: The comparison.
        entry: One of its entries.
        variation: The strength.
        rate: The learning rate.
        seed: The seed.

    Returns:
        The cell.

    Raises:
        RecipeError: A setting does not fit.
        PlanError: An option of the method is out of range.
    """
    where = f'{comparison.where}, key compare.methods, entry "{entry.label}"'
    settings = {**entry.settings, **variation.settings, "train.learning_rate": rate}
    mark = f"-{variation.mark}" if variation.mark else ""
    name = f"{slug(entry.label)}-lr{short(rate)}{mark}-seed{seed}"
    own = copy.deepcopy(dict(comparison.values))

    def make() -> Recipe:
        for key, value in sorted(settings.items(), key=lambda item: item[0].count(".")):
            set_value(own, key, copy.deepcopy(value), where=f"{where}, key {key}")
        set_value(own, "train.seed", seed, where=where)
        own["output"] = str(comparison.output / FOLDER / name)
        return make_recipe(own, folder=comparison.path.parent, where=where, fetch=comparison.fetch)

    recipe = placed(where, make)
    method = make_method(recipe.method, seed=0).name
    return Cell(name, entry.label, method, settings, rate, variation.factor, seed, recipe)


def refuse_equal(cells: Iterable[Cell], where: str) -> None:
    """Refuse two cells that mean the same run, however they are written.

    Args:
        cells: The cells.
        where: For the error message.

    Raises:
        RecipeError: There are two.
    """
    seen: dict[str, Cell] = {}
    for cell in cells:
        plain = cell.recipe.written()
        rest = {key: plain[key] for key in plain if key not in ("output", "method", "penalties")}
        method = make_method(cell.recipe.method, seed=cell.seed)
        penalties = [[penalty.name, penalty] for penalty in make_penalties(cell.recipe.penalties)]
        first = seen.setdefault(content_key([method.name, method, penalties, rest]), cell)
        if first is not cell:
            raise RecipeError(
                f"{where}, key compare.methods",
                got=f"{first.name} and {cell.name}, which mean the same run",
                wanted="each run once",
                next_step=f'Remove one of the entries "{first.label}" and "{cell.label}", or a value of its lists.',
            )


def check_cells(comparison: Comparison, cells: Sequence[Cell], model: PreTrainedModel | None = None) -> None:
    """Check cells as their runs would, with their data, and their targets against the base, which is loaded once.

    Args:
        comparison: The comparison.
        cells: The cells; of those that differ in rate and seed alone one is checked.
        model: The base, if it is loaded already.

    Raises:
        KeeptuneError: Something the user can mend, with the entry it is about; nothing was written then.
    """
    jobs: dict[str, tuple[str, Job]] = {}
    for cell in cells:
        varied = {key: value for key, value in cell.settings.items() if key != "train.learning_rate"}
        jobs.setdefault(content_key([cell.label, varied]), (cell.label, Job(cell.recipe)))
    for label, job in jobs.values():
        placed(f'{comparison.where}, entry "{label}"', job.check)
    for label, job in jobs.values():
        model = job.base() if model is None else model
        roles = tuned_roles(job.method, job.recipe.targets)
        placed(f'{comparison.where}, entry "{label}"', partial(find_targets, model, roles, job.recipe.layers))
