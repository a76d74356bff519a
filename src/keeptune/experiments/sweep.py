"""keeptune sweep: one recipe at several points and seeds, each an ordinary run, joined into one report and figure.

A plain loop, point by point on this machine. The points are checked before the first run; a run that fails is
told and the others go on; started again, finished runs are not repeated.
"""

from __future__ import annotations

import copy
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from keeptune.core.artefact import write_json
from keeptune.core.errors import KeeptuneError, RecipeError, placed
from keeptune.experiments.grid import read_section
from keeptune.methods.combined import tuned_roles
from keeptune.model.blocks import find_targets
from keeptune.pipeline.job import Job
from keeptune.pipeline.reporting import write_report
from keeptune.pipeline.run import run
from keeptune.recipe.reading import read_values, set_value
from keeptune.recipe.schema import Recipe, make_recipe

__all__ = ["Point", "Sweep", "Swept", "load_sweep", "make_sweep", "run_sweep"]

_log = logging.getLogger(__name__)

_NAME = re.compile(r"\w([\w .,=+-]{0,78}[\w=+-])?")
_FIXED = {
    "output": "each point has its own folder below the sweep's",
    "seeds": "they are the same for all points",
    "train.seed": "`seeds` lists the seeds of all points",
    "evaluate": "points are compared on the same benchmarks",
    "reference": "T has one reference for all points",
    "model": "points are compared with one base",
    "revision": "points are compared with one base",
    "dtype": "points are compared with one base",
}


@dataclass(frozen=True)
class Point:
    """One setting of a sweep.

    Args:
        name: Its label, and the beginning of its folders' names.
        settings: Dotted recipe key to value: what it changes.
        x: Its place on the figure's axis, if it has one.
        recipes: Seed to recipe.
    """

    name: str
    settings: Mapping[str, Any]
    x: float | None
    recipes: Mapping[int, Recipe]


@dataclass(frozen=True)
class Sweep:
    """A recipe at several points.

    Args:
        output: Where the joint report goes; runs are in folders below.
        points: The points, in the recipe's order.
        reference: Run folder of full fine-tuning outside the sweep, for T.
        about: What the record says beside the runs: ``grid``, ``baseline``, ``study``.
        name: Of the record and the figure.
    """

    output: Path
    points: tuple[Point, ...]
    reference: Path | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    name: str = "sweep"


@dataclass(frozen=True)
class Swept:
    """What a sweep gave.

    Args:
        report: The joint report; None where every run failed.
        failed: Run folder to the message of what failed.
        figure: Whether ``sweep.png`` could be drawn: there are numbers to draw.
        record: What ``sweep.json`` holds.
    """

    report: dict[str, Any] | None
    failed: Mapping[str, str] = field(default_factory=dict)
    figure: bool = False
    record: Mapping[str, Any] = field(default_factory=dict)


def load_sweep(path: Path | str, overrides: Mapping[str, Any] | None = None) -> Sweep:
    """Read a recipe with a ``sweep`` section and check every point, with its data and the model's targets.

    Args:
        path: The YAML file: a run's recipe with ``sweep`` (a list of points, or a grid:
            :mod:`keeptune.experiments.grid`), and ``seeds``.
        overrides: Dotted key to value, set before the points' own.

    Returns:
        The sweep.

    Raises:
        KeeptuneError: Something the user can mend, with the point it is about; nothing was written then.
    """
    path = Path(path)
    values = read_values(path, overrides)
    where = f"recipe {path}"
    raw, about = read_section(values.pop("sweep", None), where)
    return make_sweep(path, values, raw, about=about)


def make_sweep(
    path: Path,
    values: dict[str, Any],
    raw: Any,
    *,
    about: Mapping[str, Any] | None = None,
    name: str = "sweep",
    below: str = "",
    model: PreTrainedModel | None = None,
) -> Sweep:
    """Make a sweep from a recipe's values and its points, and check every point.

    Args:
        path: The recipe's file.
        values: The recipe with ``seeds``, which is taken out.
        raw: A mapping for each point: ``name``, ``x``, and the dotted keys that it changes.
        about: What the record says beside the runs.
        name: Of the record and the figure.
        below: Folder in the recipe's output for report, record and figure; the runs stand in the output itself.
        model: The base, if it is loaded already.

    Returns:
        The sweep.

    Raises:
        KeeptuneError: Something the user can mend, with the point it is about; nothing was written then.
    """
    where = f"recipe {path}"
    entries, seeds = _raw_points(raw, where), _seeds(values, where)
    base = make_recipe(values, folder=path.parent, where=where)
    points = tuple(_point(entry, values, seeds, base.output, path) for entry in entries)
    _check(points, model)
    return Sweep(base.output / below, points, base.reference, about or {}, name)


def run_sweep(sweep: Sweep) -> Swept:
    """Run every point with every seed, then join what finished.

    Args:
        sweep: From :func:`load_sweep`.

    Returns:
        The joint report, also written to ``report.json`` and ``report.html`` with ``sweep.json`` and ``sweep.png``
        (or the sweep's own name) beside them, and the messages of the runs that failed.

    Raises:
        ArtefactError: The finished runs cannot be joined.
    """
    failed: dict[str, str] = {}
    seeds = list(sweep.points[0].recipes)
    for seed in seeds:
        for point in sweep.points:
            recipe = point.recipes[seed]
            _log.info("%s: %s, seed %d", sweep.name, point.name, seed)
            message = _attempt(recipe)
            if message is not None:
                failed[str(recipe.output)] = message
                _log.warning("%s: %s, seed %d failed: %s", sweep.name, point.name, seed, message)
    done = [(point, seed) for point in sweep.points for seed in seeds if str(point.recipes[seed].output) not in failed]
    if not done:
        return Swept(None, failed)
    report = write_report(
        [point.recipes[seed].output for point, seed in done],
        sweep.output,
        reference=sweep.reference,
        labels=[point.name for point, _ in done],
    )
    rows = [_row(point, seed, entry) for (point, seed), entry in zip(done, report["methods"], strict=True)]
    record = {"axis": _axis(sweep.points), **sweep.about, "rows": rows, "failed": failed}
    record |= _findings(record)
    write_json(sweep.output / f"{sweep.name}.json", record)
    return Swept(report, failed, _draw(record, sweep.output / f"{sweep.name}.png"), record)


def _attempt(recipe: Recipe) -> str | None:
    """Run a recipe; of a failure, give the message, and log what keeptune did not foresee with its trace."""
    try:
        run(recipe)
    except KeeptuneError as error:
        return str(error)
    except (RuntimeError, ValueError, OSError) as error:  # a library's: out of memory, a matrix that does not converge
        _log.warning("sweep: %s", recipe.output, exc_info=True)
        return f"{type(error).__name__}: {error}"
    return None


def _findings(record: Mapping[str, Any]) -> dict[str, Any]:
    """Put the runs together: gains and drops per layer, or the benefit of each cell of a grid."""
    from keeptune.experiments.effects import benefits, study_rows

    if "study" in record:
        return {"summary": study_rows(record)}
    return {"benefit": found} if (found := benefits(record)) else {}


def _draw(record: Mapping[str, Any], path: Path) -> bool:
    from keeptune.report.figures.drawing import png
    from keeptune.report.figures.grid_maps import benefit_figure
    from keeptune.report.figures.layer_effects import study_figure
    from keeptune.report.figures.sweep_lines import sweep_figure

    draw = study_figure if "study" in record else benefit_figure if "benefit" in record else sweep_figure
    figure = draw(record)
    if figure is not None:
        png(figure, path)
    return figure is not None


def _row(point: Point, seed: int, entry: Mapping[str, Any]) -> dict[str, Any]:
    kept = ("name", "role", "metric", "n", "before", "after", "interval")
    return {
        "name": point.name,
        "x": point.x,
        "seed": seed,
        "settings": dict(point.settings),
        "method": entry["method"],
        **{key: entry[key] for key in ("K", "T", "KT", "trained_parameters")},
        "plan_seconds": entry["seconds"]["plan"],
        "benchmarks": [{key: benchmark[key] for key in kept} for benchmark in entry["benchmarks"]],
        "folder": str(point.recipes[seed].output),
    }


def _axis(points: Sequence[Point]) -> str | None:
    """Name the axis: the key whose values are the points' x, if there is one."""
    placed = [point for point in points if point.x is not None]
    keys = [key for key in placed[0].settings if all(p.settings.get(key) == p.x for p in placed)] if placed else []
    return keys[0] if keys else None


def _raw_points(raw: Any, where: str) -> list[dict[str, Any]]:
    example = 'Example: sweep: [{name: "rank 4", method.rank: 4}, {name: "rank 8", method.rank: 8}].'
    if not isinstance(raw, list) or not raw or not all(isinstance(entry, dict) for entry in raw):
        got = "nothing" if raw is None else "an empty list" if raw == [] else f"{raw!r}"
        raise RecipeError(
            f"{where}, key sweep",
            got=got,
            wanted="a list of points, each a name and dotted keys of the recipe",
            next_step=example,
        )
    seen: set[str] = set()
    for number, entry in enumerate(raw, start=1):
        name = entry.get("name")
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise RecipeError(
                f"{where}, sweep point {number}",
                got="no name" if name is None else f"the name {name!r}",
                wanted="at most 80 letters, digits, spaces and .,=+_-: names are folders",
                next_step=example,
            )
        if name.casefold() in seen:
            raise RecipeError(
                f"{where}, sweep point {number}",
                got=f'the name "{name}" twice (capitals do not tell folders apart everywhere)',
                wanted="a name of its own for each point",
                next_step="Rename one of them.",
            )
        seen.add(name.casefold())
    return raw


def _seeds(values: dict[str, Any], where: str) -> list[int]:
    train = values.get("train")
    seeds: list[Any] | None = values.pop("seeds", None)
    if seeds is None:
        return [train.get("seed", 0) if isinstance(train, dict) else 0]
    right = isinstance(seeds, list) and all(isinstance(s, int) and not isinstance(s, bool) and s >= 0 for s in seeds)
    if not right or not seeds or len(set(seeds)) < len(seeds):
        raise RecipeError(
            f"{where}, key seeds",
            got=repr(seeds),
            wanted="a list of different whole numbers from 0",
            next_step="Example: seeds: [0, 1, 2].",
        )
    return seeds


def _point(
    entry: Mapping[str, Any], values: Mapping[str, Any], seeds: Sequence[int], output: Path, path: Path
) -> Point:
    name = entry["name"]
    where = f"recipe {path}, sweep point {name}"
    x = entry.get("x")
    if x is not None and (isinstance(x, bool) or not isinstance(x, int | float) or not math.isfinite(x)):
        raise RecipeError(
            where, got=f"x: {x!r}", wanted="a number: the point's place on the axis", next_step="Mend it."
        )
    settings = {key: value for key, value in entry.items() if key not in ("name", "x")}
    for key in settings:
        fixed = next((k for k in _FIXED if str(key) == k or str(key).startswith(f"{k}.")), None)
        if not isinstance(key, str) or fixed:
            raise RecipeError(
                where,
                got=f"a change of {key}",
                wanted=f"no change of {fixed}: {_FIXED[fixed]}" if fixed else "dotted keys of the recipe",
                next_step="Set it once, outside the points.",
            )
    recipes = {}
    for seed in seeds:
        own = copy.deepcopy(dict(values))
        for key, value in sorted(settings.items(), key=lambda item: item[0].count(".")):
            set_value(own, key, copy.deepcopy(value), where=f"{where}, key {key}")
        set_value(own, "train.seed", seed, where=where)
        own["output"] = str(output / f"{name}-seed{seed}")
        recipes[seed] = placed(where, partial(make_recipe, own, folder=path.parent, where=where))
    return Point(name, settings, None if x is None else float(x), recipes)


def _check(points: Sequence[Point], model: PreTrainedModel | None) -> None:
    """Check each point as its run would, and its targets against the model, which is loaded once."""
    jobs = {point.name: Job(next(iter(point.recipes.values()))) for point in points}
    for name, job in jobs.items():
        placed(f"sweep point {name}", job.check)
    model = next(iter(jobs.values())).base() if model is None else model
    for name, job in jobs.items():
        roles = tuned_roles(job.method, job.recipe.targets)
        placed(f"sweep point {name}", partial(find_targets, model, roles, job.recipe.layers))
