"""From a recipe with a ``compare:`` or ``sweep:`` section to the runs that it asks for, each an ordinary run."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from keeptune.core.artefact import content_key
from keeptune.core.errors import RecipeError, placed
from keeptune.data import hub
from keeptune.experiments.axes import axes_of
from keeptune.experiments.compare_section import CompareSection, checked, read_section
from keeptune.experiments.entries import Entry, Variation, read_entries, short, slug, with_settings
from keeptune.experiments.sweep_section import axis_of, point_entries, read_sweep
from keeptune.model.blocks import find_targets
from keeptune.pipeline.job import Job
from keeptune.recipe.paths import Fetch
from keeptune.recipe.reading import read_values
from keeptune.recipe.schema import Recipe, make_method, make_penalties, make_recipe

RUNS = "runs"


@dataclass(frozen=True)
class RunSpec:
    """One run of a comparison: the run of an entry (``label``) at a rate, a strength and a seed.

    Args:
        name: Its folder's name; without the seed, the name of its setting.
        settings: Dotted recipe key to value: what it changes, except for the seed.
        strength: The factor on the method's own strength; None where it has none.
        x: Its place on the axis of a sweep's figure, if it has one.
    """

    name: str
    label: str
    method: str
    settings: Mapping[str, Any]
    learning_rate: float | None
    strength: float | None
    seed: int
    recipe: Recipe
    x: float | None = None


@dataclass(frozen=True)
class Comparison:
    """A recipe with its ``compare:`` or ``sweep:`` section.

    Args:
        values: The recipe without the section, as the file ``path`` holds it; ``base`` is the same, checked.
        section: The section; that of a sweep has the seeds alone.
        entries: What is compared, baselines included.
        plain: Label that the others are compared with: plain LoRA, or a sweep's baseline; None where there is none.
        kind: The command: ``"compare"``, ``"sweep"`` or ``"layers"``.
        about: More keys of a sweep's record: ``axis``, ``grid``, ``baseline``, ``study``, ``layers``.
        below: Folder in the output for the records.
    """

    path: Path
    values: Mapping[str, Any]
    section: CompareSection
    entries: tuple[Entry, ...]
    plain: str | None
    base: Recipe
    fetch: Fetch = hub.fetch
    kind: str = "compare"
    about: Mapping[str, Any] = field(default_factory=dict)
    below: str = ""

    @property
    def output(self) -> Path:
        """The folder of the runs."""
        return self.base.output

    @property
    def records(self) -> Path:
        """The folder of records, page and figures."""
        return self.base.output / self.below

    @property
    def where(self) -> str:
        """For error messages."""
        return f"recipe {self.path}"

    def place(self, label: str) -> str:
        """Returns where an entry stands, for error messages."""
        return f'{self.where}, entry "{label}"' if self.kind == "compare" else f"{self.where}, sweep point {label}"


def load_comparison(
    path: Path | str, overrides: Mapping[str, Any] | None = None, *, fetch: Fetch = hub.fetch
) -> Comparison:
    """Reads a recipe with a ``compare`` section; RecipeError where a key is unknown or a value does not fit.

    ``overrides`` are of the recipe or the section: ``{"compare.seeds": [0, 1]}``. Data and model are not looked at yet.
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
    train = values.get("train")
    rate = train.get("learning_rate") if isinstance(train, Mapping) else None
    rates = section.learning_rate or ([float(rate)] if isinstance(rate, int | float) else [])
    if not rates:
        raise RecipeError(
            f"{where}, key compare.learning_rate",
            got="nothing",
            wanted="learning rates: methods are compared each at its best",
            next_step="Example: learning_rate: [5e-4, 1e-3, 2e-3].",
        )
    entries, plain = read_entries(section, values, rates, where)
    base = make_recipe(values, folder=path.parent, where=where, fetch=fetch)
    if base.published is not None:
        base.published.check_labels([entry.label for entry in entries], where)
    # The metric of a standard benchmark, always a share, is known when it is scored.
    scored = [
        {"name": b.name, "role": b.role, "metric": getattr(b, "metric", None) or "accuracy"} for b in base.evaluate
    ]
    if len({b["role"] for b in scored}) == 2:  # one side alone may be scored
        placed(where, partial(axes_of, scored, section.learned, section.forgotten))
    return Comparison(path, values, section, entries, plain, base, fetch)


def load_sweep(path: Path | str, overrides: Mapping[str, Any] | None = None) -> Comparison:
    """Reads a recipe with a ``sweep`` section and ``seeds``, as :func:`load_comparison` does: points, run here."""
    values = read_values(Path(path), overrides)
    points, about = read_sweep(values.pop("sweep", None), f"recipe {path}")
    return sweep_of(Path(path), values, points, about)


def sweep_of(
    path: Path, values: dict[str, Any], points: Any, about: Mapping[str, Any], *, kind: str = "sweep", below: str = ""
) -> Comparison:
    """Returns the comparison of a recipe's values, which have ``seeds``, at points; ``about`` goes to its record."""
    where = f"recipe {path}"
    entries, train, seeds = point_entries(points, where), values.get("train"), values.pop("seeds", None)
    if seeds is None:
        seeds = [train.get("seed", 0) if isinstance(train, Mapping) else 0]
    own = {"seeds": seeds, "scales": [], "resources": None, "baselines": False}
    section = checked(CompareSection, {"methods": [entry.label for entry in entries], **own}, where)
    base = make_recipe(values, folder=path.parent, where=where)
    about = {"axis": axis_of(entries), **about}
    return Comparison(path, values, section, entries, about.get("baseline"), base, hub.fetch, kind, about, below)


def list_runs(comparison: Comparison) -> tuple[RunSpec, ...]:
    """Returns every run, entry by entry; RecipeError where a setting does not fit, or two runs would be the same."""
    specs = tuple(
        _run_spec(comparison, entry, variation, rate, seed)
        for entry in comparison.entries
        for variation in entry.variations
        for rate in entry.rates
        for seed in comparison.section.seeds
    )
    seen: dict[str, RunSpec] = {}
    for spec in specs if comparison.kind == "compare" else ():
        plain = spec.recipe.written()
        rest = {key: plain[key] for key in plain if key not in ("output", "method", "penalties")}
        method = make_method(spec.recipe.method, seed=spec.seed)
        penalties = [[penalty.name, penalty] for penalty in make_penalties(spec.recipe.penalties)]
        first = seen.setdefault(content_key([method.name, method, penalties, rest]), spec)
        if first is not spec:
            raise RecipeError(
                f"{comparison.where}, key compare.methods",
                got=f"{first.name} and {spec.name}, which mean the same run",
                wanted="each run once",
                next_step=f'Remove one of the entries "{first.label}" and "{spec.label}", or a value of its lists.',
            )
    return specs


def _run_spec(comparison: Comparison, entry: Entry, variation: Variation, rate: float | None, seed: int) -> RunSpec:
    where = comparison.place(entry.label)
    settings = {**entry.settings, **variation.settings, **({} if rate is None else {"train.learning_rate": rate})}
    parts = [slug(entry.label), *([] if rate is None else [f"lr{short(rate)}"]), variation.mark, f"seed{seed}"]
    name = "-".join(part for part in parts if part)

    def make() -> Recipe:
        own = with_settings(comparison.values, {**settings, "train.seed": seed}, where)
        own["output"] = str(comparison.output / RUNS / name)
        return make_recipe(own, folder=comparison.path.parent, where=where, fetch=comparison.fetch)

    recipe = placed(where, make)
    method = make_method(recipe.method, seed=0).name
    rate = recipe.train.get("learning_rate") if rate is None else rate
    return RunSpec(name, entry.label, method, settings, rate, variation.factor, seed, recipe, entry.x)


def by_setting(specs: Iterable[RunSpec]) -> list[list[RunSpec]]:
    """Groups runs that differ in rate and seed alone."""
    groups: dict[str, list[RunSpec]] = {}
    for spec in specs:
        varied = {key: value for key, value in spec.settings.items() if key != "train.learning_rate"}
        groups.setdefault(content_key([spec.label, varied]), []).append(spec)
    return list(groups.values())


def check_runs(comparison: Comparison, specs: Sequence[RunSpec], model: PreTrainedModel | None = None) -> None:
    """Checks one run of each setting with its data, and its targets against the base, which is loaded once.

    An error names the entry it is about.
    """
    jobs = [(comparison.place(first.label), Job(first.recipe)) for first, *_ in by_setting(specs)]
    for place, job in jobs:
        placed(place, job.check)
    for place, job in jobs:
        model = job.base() if model is None else model
        placed(place, partial(find_targets, model, job.recipe.targets, job.recipe.layers))
